"""Validation of op arguments, shared by every backend: one clear error that names the value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Require a tensor.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def as_texts(values: str | Iterable[str]) -> tuple[str, ...]:
    """One text, or several: the letters of one are never meant."""
    return (values,) if isinstance(values, str) else tuple(values)


def check_float(name: str, tensor: torch.Tensor) -> None:
    """Require a dense tensor of float32, bfloat16 or float16, of any shape.

    Raises:
        TypeError: it is none.
    """
    check_tensor(name, tensor)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {tensor.dtype}")


def check_matrix(name: str, tensor: torch.Tensor) -> None:
    """Require a matrix that :func:`check_float` takes.

    Raises:
        TypeError, ValueError: it is none.
    """
    check_float(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(tensor.shape)}")


def memory_span(tensor: torch.Tensor) -> int:
    """Elements of memory from the first element of a strided tensor that has some to its last, gaps included."""
    return 1 + sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))


def check_same_shape(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """Require exactly ``shape``.

    Raises:
        ValueError: another shape.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_same_device(**tensors: torch.Tensor) -> None:
    """Require all tensors on one device.

    Raises:
        ValueError: they are on several.
    """
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all tensors must be on one device, got {places}")


def structure_count(weight: torch.Tensor, axis: str, block: int) -> int:
    """Number of structures of ``block`` rows or columns in ``weight`` [O, I], or in all experts of [E, O, I].

    Raises:
        ValueError: unknown axis, ``block`` below 1, or an extent that ``block`` does not divide.
    """
    if axis not in ("row", "column"):
        raise ValueError(f"axis must be 'row' or 'column', got {axis!r}")
    check_block(block)
    extent = weight.shape[-2 if axis == "row" else -1] * weight.shape[:-2].numel()
    if extent % block:
        raise ValueError(f"block {block} does not divide the {extent} {axis}s of the weight")
    return extent // block


def check_block(block: int) -> None:
    """Require a number of consecutive rows or columns.

    Raises:
        TypeError: no whole number.
        ValueError: below 1.
    """
    if not isinstance(block, Integral):
        raise TypeError(f"block must be a whole number, got {block!r}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")


def check_power(power: int) -> None:
    """Require an exponent of the element scores that is implemented.

    Raises:
        ValueError: neither 1 nor 2.
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power!r}")


def score_buffer(out: torch.Tensor | None, count: int, weight: torch.Tensor) -> torch.Tensor:
    """``out`` after validation, or fresh zeros: float32 [count] on the device of ``weight``.

    Raises:
        TypeError: ``out`` is no float32 tensor.
        ValueError: its shape, device or strides do not fit, or it requires a gradient.
    """
    if out is None:
        return torch.zeros(count, dtype=torch.float32, device=weight.device)
    check_tensor("out", out)
    if out.dtype != torch.float32:
        raise TypeError(f"out must be float32, got {out.dtype}")
    check_same_shape("out", out, (count,))
    check_same_device(out=out, weight=weight)
    if count > 1 and out.stride(0) == 0:
        raise ValueError("out must not be an expanded tensor: all its scores would share one element")
    if out.requires_grad:
        raise ValueError("out must not require grad: it is accumulated in place")
    return out


def result(name: str, out: torch.Tensor | None, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """``out`` if it fits, otherwise uninitialised memory of ``shape`` in the dtype and on the device of ``like``.

    Raises:
        ValueError: shape or dtype of ``out`` does not fit.
    """
    if out is None:
        return like.new_empty(*shape)
    if out.shape != tuple(shape) or out.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype} {tuple(shape)}, got {out.dtype} {tuple(out.shape)}")
    return out
