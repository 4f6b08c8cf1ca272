"""RMS norm kernels, one row per program; the row stays in registers between its two uses."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import aligned, readable, readable_rows, writable_rows
from gisp_kernels.forms import next_power_of_2, run

# A row of up to 8192 elements takes 8 warps; hidden size never changes in a run, so it may shape the kernel.
WIDE = 2048


@triton.jit(do_not_specialize=["stride_x", "stride_d", "stride_t", "stride_n"])
def _add_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, D]
    delta_ptr,  # [T, D]
    weight_ptr,  # [D]
    total_ptr,  # [T, D]
    normed_ptr,  # [T, D]
    rstd_ptr,  # float32 [T]
    stride_x,
    stride_d,
    stride_t,
    stride_n,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """total = x + delta; rstd = 1 / rms(total); normed = weight * round(total * rstd)."""
    row = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        stride_x = (stride_x // 16) * 16
        stride_d = (stride_d // 16) * 16
        stride_t = (stride_t // 16) * 16
        stride_n = (stride_n // 16) * 16
    offs = tl.arange(0, BLOCK)
    mask = offs < D
    x = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0)
    dtype = x.dtype
    if ADD:
        delta = tl.load(delta_ptr + row * stride_d + offs, mask=mask, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * stride_t + offs, x, mask=mask)
    value = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    unit = (value * rstd).to(dtype)
    tl.store(normed_ptr + row * stride_n + offs, weight.to(tl.float32) * unit.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["stride_x", "stride_n"])
def _apply_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, D]
    rstd_ptr,  # float32 [T]
    weight_ptr,  # [D]
    normed_ptr,  # [T, D]
    stride_x,
    stride_n,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """normed = weight * round(x * rstd)."""
    row = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        stride_x = (stride_x // 16) * 16
        stride_n = (stride_n // 16) * 16
    offs = tl.arange(0, BLOCK)
    mask = offs < D
    x = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0)
    unit = (x.to(tl.float32) * tl.load(rstd_ptr + row)).to(x.dtype)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    tl.store(normed_ptr + row * stride_n + offs, weight.to(tl.float32) * unit.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["stride_o", "stride_g", "stride_x"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [T, D], added to if ADD
    grad_ptr,  # [T, D], dL/d(normed)
    x_ptr,  # [T, D]
    rstd_ptr,  # float32 [T]
    weight_ptr,  # [D]
    stride_o,
    stride_g,
    stride_x,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out (+)= rstd * (g * w - u * mean(g * w * u)), u = x * rstd."""
    row = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        stride_o = (stride_o // 16) * 16
        stride_g = (stride_g // 16) * 16
        stride_x = (stride_x // 16) * 16
    offs = tl.arange(0, BLOCK)
    mask = offs < D
    rstd = tl.load(rstd_ptr + row)
    unit = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0).to(tl.float32) * rstd
    weighted = tl.load(grad_ptr + row * stride_g + offs, mask=mask, other=0.0).to(tl.float32)
    weighted *= tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    result = rstd * (weighted - unit * (tl.sum(weighted * unit, axis=0) / D))
    if ADD:
        result += tl.load(out_ptr + row * stride_o + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_o + offs, result, mask=mask)


def _by_rows(
    kernel: triton.JITFunction,
    tensors: tuple[torch.Tensor, ...],
    strides: tuple[int, ...],
    *numbers: float,
    add: tuple[bool, ...] = (),
) -> None:
    """Launch a program a row of the first tensor [T, D]; ``add``: what the kernel knows besides the width."""
    tokens, width = tensors[0].shape
    block, warps = _shape(width)
    constants = (width, block, *add, aligned(*strides))
    run(kernel, (tokens,), tensors, (*strides, *numbers), constants, num_warps=warps)


@functools.cache
def _shape(width: int) -> tuple[int, int]:
    """Elements of a program's row and its warps; the widths of a run are few."""
    block = next_power_of_2(width)
    return block, 8 if block > WIDE else 4 if block > 256 else 1


def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    total: torch.Tensor,
    normed: torch.Tensor,
) -> torch.Tensor:
    """See :func:`gisp_kernels.ops.decoder.add_rms_norm`; fills ``total`` and ``normed``, returns the inverse RMS."""
    tokens, width = x.shape
    rstd = x.new_empty(tokens, dtype=torch.float32)
    pitch_n = writable_rows("out", normed)
    x, pitch_x = readable_rows(x)
    add = delta is not None
    if delta is None:
        delta, total, pitch_d, pitch_t = x, x, pitch_x, pitch_x
    else:
        pitch_t = writable_rows("total", total)
        delta, pitch_d = readable_rows(delta)
    if tokens and width:
        strides = (pitch_x, pitch_d, pitch_t, pitch_n)
        _by_rows(_add_norm_kernel, (x, delta, readable(weight), total, normed, rstd), strides, float(eps), add=(add,))
    return rstd


def apply_norm(x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, normed: torch.Tensor) -> None:
    """See :func:`gisp_kernels.ops.decoder.rms_norm_apply`; fills ``normed``."""
    tokens, width = x.shape
    pitch_n = writable_rows("out", normed)
    x, pitch_x = readable_rows(x)
    if tokens and width:
        _by_rows(_apply_kernel, (x, readable(rstd), readable(weight), normed), (pitch_x, pitch_n))


def backward(
    grad: torch.Tensor | None, normed_grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """See :func:`gisp_kernels.ops.decoder.rms_norm_backward_`."""
    tokens, width = x.shape
    out = normed_grad if grad is None else grad
    pitch_o = writable_rows("normed_grad" if grad is None else "grad", out)
    normed_grad, pitch_g = readable_rows(normed_grad)
    x, pitch_x = readable_rows(x)
    if tokens and width:
        operands = out, normed_grad, x, readable(rstd), readable(weight)
        _by_rows(_backward_kernel, operands, (pitch_o, pitch_g, pitch_x), add=(grad is not None,))
    return out
