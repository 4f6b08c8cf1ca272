"""Train the demo decoder from scratch.

    python -m benchmarks.decoders.train --out DIR [--corpus FILE.jsonl.gz]

On a CPU a few dozen steps with a small --batch check the script and no more.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import LlamaForCausalLM

from benchmarks.common.command import Parser, check_writable, count, exit_code, positive, write_json
from benchmarks.decoders.corpus import Corpus, add_corpus_option, load
from benchmarks.decoders.llama import TrainConfig, build_model, next_token_loss, perplexity
from benchmarks.decoders.tokens import encode, train_tokenizer, windows
from gisp.errors import GispError
from gisp.model.load import resolve_device

NAME = "python -m benchmarks.decoders.train"
# Beside the checkpoint: how it was trained.
RECORD = "training.json"


def batches(stream: torch.Tensor, config: TrainConfig) -> Iterator[torch.Tensor]:
    """Endless batches [batch, seq_len] of a stream of at least one sequence.

    Each pass over the stream is cut at another place and shuffled anew.
    """
    generator = torch.Generator().manual_seed(config.seed)
    offsets = min(config.seq_len, len(stream) - config.seq_len + 1)
    pending = stream.new_empty(0, config.seq_len)
    while True:
        offset = int(torch.randint(0, offsets, (), generator=generator))
        rows = windows(stream, config.seq_len, offset)
        order = torch.randperm(len(rows), generator=generator).to(stream.device)
        pending = torch.cat([pending, rows[order]])
        while len(pending) >= config.batch:
            yield pending[: config.batch]
            pending = pending[config.batch :]


def fit(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    unseen: torch.Tensor,
    config: TrainConfig,
    *,
    max_seconds: float | None = None,
    compiled: bool = False,
) -> tuple[list[dict[str, float]], int]:
    """Train in place; ``stream`` [T] and held-out rows ``unseen`` [N, S] are int64 on its device.

    ``max_seconds`` shortens the run once, by the speed of its first steps, so that the learning
    rate still falls to its end. It takes runs of more than 40 steps.

    Returns:
        The loss curve, rows of step, tokens, loss, lr and seconds and in some the held-out
        perplexity; and the number of steps.

    Raises:
        GispError: the loss is no longer finite.
    """
    on_gpu = stream.is_cuda
    optimizer = _optimizer(model, config, fused=on_gpu)
    runner: Any = torch.compile(model) if compiled else model
    runner.train()
    steps = config.steps
    curve: list[dict[str, float]] = []
    begin = mark = time.perf_counter()
    for step, rows in enumerate(batches(stream, config)):
        lr = config.lr_at(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            loss = next_token_loss(runner, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        # The first steps hold compilation and warm-up: the speed is that of the steps after them.
        if max_seconds is not None and done in (10, 40):
            loss.item()
            now = time.perf_counter()
            if done == 40:
                left = (max_seconds - (now - begin)) / ((now - mark) / 30)
                steps = min(steps, done + max(0, int(left)))
            mark = now
        if step % config.log_every == 0 or done % config.evaluate_every == 0 or done == steps:
            row = _curve_row(done, rows.numel(), loss.item(), lr, time.perf_counter() - begin)
            if done % config.evaluate_every == 0:
                with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                    row["heldout_perplexity"] = perplexity(model, unseen, config.batch)
            curve.append(row)
            left = row["seconds"] / done * (steps - done)
            print(f"step {done}/{steps} {json.dumps(row)} {left:.0f} s left", flush=True)
        if done == steps:
            break
    return curve, steps


def _optimizer(model: LlamaForCausalLM, config: TrainConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW that decays matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=fused)


def _curve_row(done: int, batch_tokens: int, loss: float, lr: float, seconds: float) -> dict[str, float]:
    if not math.isfinite(loss):
        raise GispError(f"the loss is {loss} at step {done}: give a lower --lr")
    tokens = done * batch_tokens
    return {"step": done, "tokens": tokens, "loss": loss, "lr": lr, "seconds": round(seconds, 2)}


def train(
    corpus: Corpus,
    out: Path,
    config: TrainConfig,
    *,
    device: str = "auto",
    max_seconds: float | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Train on a corpus; save checkpoint (bfloat16), tokenizer and ``training.json`` into ``out``.

    Returns:
        What ``training.json`` holds. Its held-out perplexity is that of the saved checkpoint on
        all held-out files, in rows of ``seq_len`` tokens.

    Raises:
        GispError: too little text on a side of the split, no such device or folder, or a loss no longer finite.
    """
    place = resolve_device(device)
    kept, heldout = corpus.texts()
    if not kept or not heldout:
        raise GispError(f"the corpus has {len(kept)} training and {len(heldout)} held-out files: give more text")
    tokenizer = train_tokenizer(kept, config.vocab_size)
    stream = encode(tokenizer, kept).to(place)
    unseen = windows(encode(tokenizer, heldout), config.seq_len).to(place)
    # Both raise before anything costly: too little text, nowhere to write.
    windows(stream, config.seq_len)
    check_writable(out / RECORD)
    print(f"{len(stream):,} training tokens, {unseen.numel():,} held out", flush=True)
    # Any: the library's decorator hides the signature of to() from the type checker.
    model: Any = build_model(config, tokenizer)
    model.to(place)
    curve, steps = fit(model, stream, unseen, config, max_seconds=max_seconds, compiled=compiled)
    saved = _save(model, tokenizer, out).to(place)
    report = {
        "heldout_perplexity": perplexity(saved, unseen, config.batch),
        "heldout_tokens": unseen.numel(),
        "steps": steps,
        "tokens": steps * config.batch * config.seq_len,
        "training_tokens": len(stream),
        "seconds": curve[-1]["seconds"],
        "parameters": sum(p.numel() for p in saved.parameters()),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in (torch, transformers, tokenizers)},
        },
        "corpus": {
            "python": corpus.python,
            "sha256": corpus.sha256(),
            "files": len(corpus.files),
            "training_files": len(kept),
            "heldout_files": len(heldout),
        },
        "config": {**asdict(config), "compiled": compiled},
        "loss_curve": curve,
    }
    write_json(out / RECORD, report)
    return report


def _save(model: Any, tokenizer: Any, out: Path) -> Any:
    """Write a model in bfloat16 and its tokenizer; the model as anyone reads it back."""
    model.to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # The writer leaves the weights readable by their owner alone, which would follow into packages.
    (out / "model.safetensors").chmod(0o644)
    return LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16, trust_remote_code=False)


def parser() -> argparse.ArgumentParser:
    base = TrainConfig
    options = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    add_corpus_option(options)
    options.add_argument("--steps", type=count, default=base.steps, help=f"optimizer steps ({base.steps})")
    options.add_argument("--batch", type=count, default=base.batch, help=f"sequences per step ({base.batch})")
    options.add_argument("--lr", type=positive, default=base.lr, help=f"peak learning rate ({base.lr})")
    options.add_argument("--seed", type=int, default=base.seed, help=f"of initial weights and order ({base.seed})")
    options.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options.add_argument("--max-seconds", type=positive, help="shorten the run to about this time")
    options.add_argument("--compile", action="store_true", help="run the model through torch.compile")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        GispError: bad options, no corpus, too little text, or a loss no longer finite.
    """
    args = parser().parse_args(argv)
    report = train(
        load(args.corpus),
        args.out,
        TrainConfig(steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed),
        device=args.device,
        max_seconds=args.max_seconds,
        compiled=args.compile,
    )
    print(f"held-out perplexity {report['heldout_perplexity']:.3f}, saved in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
