"""Recover quality of an exported model with LoRA, merge the adapter and save a pruned folder that loads like before.

    python examples/heal_lora.py EXPORT --data train.jsonl --held-out heldout.jsonl --out healed

needs ``pip install . './python[lora]'`` in the checkout. Only adapters are trained: low-rank updates of every
projection of the decoder layers. They are merged into the weights at the end, so the healed model has the shapes, the
size and the speed of the export. Perplexity on held-out text is measured before training and of the folder that was
written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import gisp
from gisp.data import Sequences, load_sequences
from gisp.errors import GispError
from gisp.evaluate import Perplexity, perplexity
from gisp.export.beside import copy_beside
from gisp.export.folder import check_place, new_folder
from gisp.model.load import resolve_device
from gisp.progress import reporting

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches(data: Sequences, size: int, steps: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``steps`` batches of ``size`` sequences as (input_ids, labels); every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += torch.randperm(len(data), generator=generator).tolist()
        yield data.batch(waiting[:size])
        del waiting[:size]


def train(
    model: Any, data: Sequences, *, steps: int, lr: float, rank: int, batch_size: int, seed: int
) -> tuple[Any, list[float]]:
    """Train LoRA adapters of a model.

    Returns:
        The model with its adapters (a peft model), and the loss of every step before its update.
    """
    torch.manual_seed(seed)
    # alpha = 2 * rank: the usual scale, with which one learning rate fits several ranks.
    adapted: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    warmup = max(1, steps // 20)
    # Linear warm-up, then linear decay to zero.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    adapted.train()
    losses = []
    for step, (ids, labels) in enumerate(batches(data, batch_size, steps, seed), start=1):
        loss = adapted(input_ids=ids.to(adapted.device), labels=labels.to(adapted.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % max(1, steps // 10) == 0:
            print(f"step {step}/{steps}  loss {losses[-1]:.4f}", flush=True)
    return adapted.eval(), losses


def save(merged: Any, export: Path, out: Path, dtype: torch.dtype, note: str) -> None:
    """Write a merged model beside the export's tokenizer and model card; the folder appears whole or not at all."""
    with new_folder(out) as folder:
        merged.to(dtype).save_pretrained(folder)
        copy_beside(folder, merged, export)
        if (export / "README.md").is_file():
            shutil.copyfile(export / "README.md", folder / "README.md")
        with (folder / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n## Healed\n\n{note} Logits and perplexities above are those before healing.\n")


def heal(arguments: argparse.Namespace) -> tuple[Perplexity, Perplexity]:
    """Perplexity on held-out text before and after; writes the healed folder."""
    export, out = Path(arguments.export), Path(arguments.out)
    check_place(out)
    if arguments.steps < 1 or arguments.rank < 1 or not arguments.lr > 0:
        raise GispError("--steps and --rank must be at least 1, --lr above 0")
    device = resolve_device(arguments.device)
    model = gisp.load(export, device=str(device))
    dtype = model.dtype
    model.float()
    train_data, held_out = (
        load_sequences(
            spec,
            vocab_size=model.get_input_embeddings().num_embeddings,
            seq_len=arguments.seq_len,
            tokenizer_from=str(export),
        )
        for spec in (arguments.data, arguments.held_out)
    )
    held_out = held_out.first(max(1, arguments.held_out_tokens // arguments.seq_len))
    before = perplexity(model, held_out, arguments.seq_len)
    print(f"before: perplexity {before.perplexity:.4f} ({before.tokens:,} tokens, window {before.window})", flush=True)
    batch_size = max(1, arguments.batch_tokens // arguments.seq_len)
    started = time.perf_counter()
    adapted, _ = train(
        model,
        train_data,
        steps=arguments.steps,
        lr=arguments.lr,
        rank=arguments.rank,
        batch_size=batch_size,
        seed=arguments.seed,
    )
    seconds = time.perf_counter() - started
    how = (
        f"{arguments.steps} steps of {batch_size} x {arguments.seq_len} tokens of {Path(arguments.data).name}, "
        f"LoRA rank {arguments.rank}, lr {arguments.lr:g}"
    )
    save(adapted.merge_and_unload(), export, out, dtype, f"{how}; merged.")
    # What counts is the folder: merged, in the export's dtype, loaded anew.
    healed = gisp.load(out, device=str(device), dtype=torch.float32)
    after = perplexity(healed, held_out, arguments.seq_len)
    print(f"after:  perplexity {after.perplexity:.4f} ({how}, {seconds:.0f} s)")
    with (out / "README.md").open("a", encoding="utf-8") as card:
        card.write(
            f"Perplexity {before.perplexity:.4f} before, {after.perplexity:.4f} after ({after.tokens:,} tokens of "
            f"{Path(arguments.held_out).name}, window {after.window}, float32).\n"
        )
    print(out)
    return before, after


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", help="folder that `gisp export` wrote (hf or uniform)")
    parser.add_argument("--data", required=True, help="training text or tokens, as for `gisp prune`")
    parser.add_argument("--held-out", required=True, help="text or tokens to measure perplexity on")
    parser.add_argument(
        "--held-out-tokens", type=int, default=16384, help="the first so many tokens of --held-out are used"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument(
        "--seq-len", type=int, default=128, help="tokens per sequence, and per window of the evaluation"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line for bad input."""
    try:
        with reporting(True):
            heal(parse(argv))
    except GispError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
