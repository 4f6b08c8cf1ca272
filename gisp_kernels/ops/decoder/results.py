"""Where an op writes its result."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def result(name: str, out: torch.Tensor | None, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """``out`` if it fits, otherwise uninitialised memory of ``shape`` in the dtype and on the device of ``like``.

    Raises:
        ValueError: shape or dtype of ``out`` does not fit.
    """
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if out.shape != tuple(shape) or out.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype} {tuple(shape)}, got {out.dtype} {tuple(out.shape)}")
    return out
