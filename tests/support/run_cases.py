"""A short run of a tiny model, whole or cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokens

import gisp
from gisp.run.trajectory import StepRecord, Trajectory

OPTIONS: dict[str, Any] = {
    "sparsity": 0.3,
    "steps": 4,
    "align": 4,
    "batch_tokens": 64,
    "device": "cpu",
    "dtype": "float32",
}

# Of a run that sees all tokens at every step and may take anything from every layer.
EXACT_OPTIONS: dict[str, Any] = {
    "preset": "paper",
    "steps": 6,
    "sparsity": 0.6,
    "device": "cpu",
    "dtype": "float32",
    "protect_last": 0,
}


def run_into(out: Path, model_folder: Path, token_file: Path, **options: Any) -> Trajectory:
    return gisp.prune(model_folder, token_file, out=out, **{**OPTIONS, **options})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tiny_tokens(2)).logits
    return found


def cut_after(step: int) -> Callable[[StepRecord, int], None]:
    """An ``on_step`` that interrupts a run once a step is on disk."""

    def stop(record: StepRecord, steps: int) -> None:
        if record.step == step:
            raise KeyboardInterrupt

    return stop
