"""Operands of the kernels that walk along contiguous rows."""

from __future__ import annotations

import torch


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def check_writable(name: str, tensor: torch.Tensor) -> None:
    """Refuse a result that a kernel cannot write in place.

    Raises:
        ValueError: the last dimension is not contiguous.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} is written in place and must have contiguous rows, got strides {tensor.stride()}")
