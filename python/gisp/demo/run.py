"""The demonstration: prune, export, reload in plain transformers, evaluate, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gisp.config.options import make_config
from gisp.data import Sequences, load_sequences
from gisp.demo import demo_files
from gisp.errors import GispError
from gisp.evaluate.perplexity import Perplexity, perplexity
from gisp.export.run import export_run
from gisp.model.load import load_dense, resolve_device
from gisp.report.write import write_report
from gisp.run.evaluations import THIS_RUN, add_evaluations
from gisp.run.one_shot import one_shot
from gisp.run.prune import prune
from gisp.run.record import library_versions
from gisp.run.trajectory import Trajectory

SPARSITIES = (0.2, 0.3, 0.4, 0.5)
WINDOW = 128
# A smaller cut of preset fast, so that two CPU cores finish in minutes.
OPTIONS: dict[str, Any] = {"preset": "fast", "sparsity": 0.5, "steps": 100, "batch_tokens": 2048, "seq_len": 128}
_HELD_OUT_ROWS = 400


@dataclass(frozen=True)
class DemoRow:
    """One size: decoder sparsity, parameters of the exported model, perplexity, and that of one-shot pruning."""

    sparsity: float
    parameters: int
    perplexity: float
    one_shot: float | None


@dataclass(frozen=True)
class DemoResult:
    """Rows from dense to the smallest, and where everything lies."""

    rows: tuple[DemoRow, ...]
    tokens: int
    window: int
    exports: tuple[Path, ...]
    report: Path


def run_demo(out: Path, *, device: str = "auto", say: Callable[[str], None] = print) -> DemoResult:
    """Prune the shipped decoder and compare it with one-shot pruning on held-out text.

    Raises:
        GispError: ``out`` is taken.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GispError(f"{out} is not empty: give another --out or remove it")
    files = demo_files()
    place = resolve_device(device)
    dense = load_dense(str(files.model), place, torch.float32)
    vocab_size = dense.get_input_embeddings().num_embeddings
    held_out = load_sequences(
        str(files.heldout), vocab_size=vocab_size, seq_len=WINDOW, tokenizer_from=str(files.model)
    ).first(_HELD_OUT_ROWS)
    run = out / "run"
    say(f"pruning {files.model.name} ({sum(p.numel() for p in dense.parameters()):,} parameters) on {place} into {run}")
    options = {**OPTIONS, "device": device, "dtype": "float32"}
    trajectory = prune(str(files.model), str(files.calibration), out=run, **options)
    spent = sum(step.tokens for step in trajectory.steps)
    result = perplexity(dense, held_out, WINDOW)
    rows = [DemoRow(0.0, sum(p.numel() for p in dense.parameters()), result.perplexity, None)]
    found = [_evaluation(trajectory, THIS_RUN, 0.0, result)]
    exports = []
    say(f"one-shot pruning for comparison, on the same {spent:,} calibration tokens")
    baselines = _one_shot(spent, held_out, place)
    for sparsity, (reached, baseline) in zip(SPARSITIES, baselines, strict=True):
        folder = out / f"export-{round(sparsity * 100)}"
        done = export_run(run, sparsity, folder, device=device)
        exports.append(folder)
        model = _reload(folder).to(place)
        result = perplexity(model, held_out, WINDOW)
        found.append(_evaluation(trajectory, THIS_RUN, done.spec.sparsity, result))
        found.append(_evaluation(trajectory, "one-shot", reached, baseline))
        parameters = sum(p.numel() for p in model.parameters())
        rows.append(DemoRow(done.spec.sparsity, parameters, result.perplexity, baseline.perplexity))
        say(f"exported {folder}, reloaded in plain transformers, perplexity {result.perplexity:.2f}")
    add_evaluations(run, found)
    return DemoResult(tuple(rows), result.tokens, WINDOW, tuple(exports), write_report(run).html)


def _reload(folder: Path) -> Any:
    """The exported folder as any user of transformers would open it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)


def _one_shot(tokens: int, held_out: Sequences, device: torch.device) -> list[tuple[float, Perplexity]]:
    """Perplexity after removing everything in one step, scored on as many tokens as the whole run saw."""
    files = demo_files()
    model = load_dense(str(files.model), device, torch.float32)
    vocab_size = model.get_input_embeddings().num_embeddings
    calibration = load_sequences(
        str(files.calibration), vocab_size=vocab_size, seq_len=int(OPTIONS["seq_len"]), tokenizer_from=str(files.model)
    ).first(max(1, tokens // int(OPTIONS["seq_len"])))
    config = make_config(**{**OPTIONS, "steps": None, "batch_tokens": None}, one_shot=True)
    pruned = one_shot(model, calibration, SPARSITIES, config)
    return [(reached, perplexity(smaller, held_out, WINDOW)) for reached, smaller in pruned]


def _evaluation(trajectory: Trajectory, label: str, sparsity: float, result: Perplexity) -> dict[str, Any]:
    return {
        **asdict(result),
        "label": label,
        "fingerprint": trajectory.base_model["fingerprint"],
        "sparsity": sparsity,
        "step": trajectory.step_for(sparsity) if label == THIS_RUN else None,
        "stride": result.window,
        "data": str(demo_files().heldout),
        "protocol": {"rows": _HELD_OUT_ROWS, "dtype": "float32"},
        "versions": library_versions(),
    }
