"""Loading exported and plain model folders without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gisp.errors import GispError, quoted
from gisp.export.modeling_gisp import AUTO_CLASSES, FAMILIES, classes_of
from gisp.export.nested.model import load_nested
from gisp.export.nested.place import is_nested
from gisp.model.load import load_dense, resolve_device
from gisp.model.modes import default_device
from gisp.model.paths import check_model_path


@default_device()
def load(
    path: str | Path,
    *,
    sparsity: float | None = None,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    verify: bool = False,
) -> Any:
    """A causal language model from an exported folder, a nested checkpoint, a plain model folder or a hub name.

    Args:
        sparsity: only for a nested checkpoint: the size to load, that of the nearest step; ``None`` loads the end of
            the run.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        dtype: dtype of the weights; ``None`` keeps that of the files.
        verify: only for a nested checkpoint: first compare the SHA-256 of all its files.

    Returns:
        The model, in evaluation mode. From then on ``AutoModelForCausalLM`` loads exports without remote code too.

    Raises:
        GispError: missing, foreign, incomplete or broken model.
    """
    check_model_path(str(path))
    place = resolve_device(device)
    kind = _floating(dtype)
    if is_nested(path):
        return load_nested(path, sparsity, device=place, dtype=kind, verify=verify)
    if sparsity is not None or verify:
        given = f"sparsity {sparsity}" if sparsity is not None else "verify"
        raise GispError(f"{given} needs a nested checkpoint, {path} holds one size: leave it out")
    register_models()
    return load_dense(str(path), place, kind or "auto")


def _floating(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype a caller gave by itself or by name; ``None`` for the checkpoint's own.

    Raises:
        GispError: it is no floating dtype.
    """
    if dtype is None or dtype == "auto":
        return None
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise GispError(f"unknown dtype {quoted(dtype)}: give float32, bfloat16, float16 or leave it out")
    return kind


def register_models() -> None:
    """Tell transformers' Auto classes about the pruned model types."""
    import transformers

    autos = [getattr(transformers, name) for name in AUTO_CLASSES]
    for name in FAMILIES:
        config, *models = classes_of(f"gisp_{name}")
        autos[0].register(config.model_type, config, exist_ok=True)
        for auto, model in zip(autos[1:], models, strict=True):
            auto.register(config, model, exist_ok=True)
