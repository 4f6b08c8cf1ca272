"""Evaluating whatever a path names: a dense model, an exported folder, or a run at a sparsity."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from gisp.compensation import CompensationRequest, compensate
from gisp.data import load_sequences
from gisp.errors import GispError
from gisp.evaluate import perplexity
from gisp.loading import load
from gisp.model_io import check_model_path, resolve_device, resolve_dtype
from gisp.nested import is_nested
from gisp.run_record import RECORD
from gisp.trajectory import Trajectory, move_to


def is_run(target: str) -> bool:
    """Whether a path is a run folder (or a folder that is no model either, so the error speaks of runs)."""
    path = Path(target)
    return path.is_dir() and ((path / RECORD).exists() or not (path / "config.json").exists())


def evaluate_target(
    target: str,
    data: str,
    *,
    sparsity: float | None = None,
    window: int = 128,
    device: str = "auto",
    dtype: str | None = None,
    compensation: CompensationRequest | None = None,
) -> dict[str, Any]:
    """Perplexity with its conditions: ``perplexity, tokens, window, sparsity, step, data, parameters``.

    With a compensation also ``compensation``: what was done.

    Args:
        target: dense model or exported folder, hub name, or run folder.
        sparsity: point of a run or nested checkpoint (``None`` = its end); only for these.
        compensation: done to the pruned model first; only for a run.
    """
    step: int | None = None
    compensated: dict[str, str] = {}
    place = resolve_device(device)
    if compensation is not None and not is_run(target):
        raise GispError(f"--compensate {compensation.options.method} needs a run folder, {target} is none")
    if is_run(target):
        trajectory = Trajectory.load(target)
        step = trajectory.step_for(sparsity)
        model = trajectory.load_base(device=device, dtype=dtype)
        source = str(trajectory.base_model["path"])
        reached = trajectory.sparsity_at(step)
        move_to(trajectory.shrinkable(model), trajectory, step)
        if compensation is not None:
            compensated["compensation"] = compensation.describe(
                compensate(model, compensation.calibration, **asdict(compensation.options))
            )
    else:
        if sparsity is not None and not is_nested(target):
            raise GispError(
                f"--sparsity {sparsity} needs a run folder or a nested checkpoint, {target} is a model: leave it out"
            )
        check_model_path(target)
        source = target
        model = load(target, sparsity=sparsity, device=str(place), dtype=resolve_dtype(dtype, place))
        reached = float((getattr(model.config, "gisp", None) or {}).get("sparsity", 0.0))
    vocab_size = model.get_input_embeddings().num_embeddings
    sequences = load_sequences(
        data,
        vocab_size=vocab_size,
        seq_len=None if data.endswith(".safetensors") else window,
        tokenizer_from=source,
        held_out=True,
    )
    result = perplexity(model, sequences, window)
    return {
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "window": result.window,
        "sparsity": reached,
        "step": step,
        "data": data,
        "parameters": sum(p.numel() for p in model.parameters()),
        **compensated,
    }
