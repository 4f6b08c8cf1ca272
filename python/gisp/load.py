"""Loading exported and plain model folders without remote code."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gisp.errors import GispError
from gisp.model_io import check_model_path, load_dense, resolve_device


def load(path: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
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
    return load_dense(str(path), place, dtype or _stored_dtype(path))


def register_models() -> None:
    """Tell transformers' Auto classes about the pruned model types."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from gisp.export.modeling_gisp import CLASSES

    for model_type, (config, model, causal_lm) in CLASSES.items():
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


def _stored_dtype(path: str | Path) -> torch.dtype:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers raises many types for configurations it cannot read
        raise GispError(f"model {path} cannot be loaded: {' '.join(str(error).split())[:240]}") from None
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


class _CallableModule(ModuleType):
    """``gisp.load`` names the public function, but importing this module rebinds that name to the module."""

    def __call__(self, path: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
        return load(path, device=device, dtype=dtype)


sys.modules[__name__].__class__ = _CallableModule
