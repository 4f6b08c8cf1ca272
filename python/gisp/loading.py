"""Loading exported and plain model folders without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gisp.model_io import check_model_path, load_dense, resolve_device


def load(path: str | Path, *, device: str = "cpu", dtype: torch.dtype | str | None = None) -> Any:
    """A causal language model from an exported folder, a plain model folder or a hub name.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        dtype: of the weights; ``None`` keeps the checkpoint's.

    Returns:
        The model, complete, in evaluation mode. It and ``AutoModelForCausalLM`` know the pruned model types afterwards.

    Raises:
        GispError: missing, foreign, incomplete or broken model.
    """
    check_model_path(str(path))
    place = resolve_device(device)
    register_models()
    return load_dense(str(path), place, dtype or "auto")


def register_models() -> None:
    """Tell transformers' Auto classes about the pruned model types."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from gisp.export.modeling_gisp import CLASSES

    for model_type, (config, model, causal_lm) in CLASSES.items():
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
