"""Rows of a matrix rounded to 8-bit floats (e4m3) with a scale each, and the same transposed.

A row is read twice, the second time from the cache. Widths and token counts are no part of the compiled kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import aligned, check_writable, readable
from gisp_kernels.forms import ceil_div, run

# Columns a program reads at a time, and its warps.
ROW = 2048, 4
# Rows that run together must stay in the second-level cache until they are read again: of wide ones fewer run.
WIDE = 8192
WIDE_ROW = 8192, 16
BLOCK_O, BLOCK_I = 64, 128
TILE_WARPS = 8


@triton.jit(do_not_specialize=["K", "stride_x", "stride_q"])
def _quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, K]
    column_ptr,  # float32 [K]
    q_ptr,  # e4m3 [M, K]
    scale_ptr,  # float32 [M]
    K,
    stride_x,
    stride_q,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """scale = max |x * column| / LARGEST; q = round(x * column / scale), a row per program."""
    row = tl.program_id(0).to(tl.int64)
    width = K
    if ALIGNED:
        # Widths are no part of the compiled kernel; this tells it that 16-byte loads are safe.
        width = (K // 16) * 16
        stride_x = (stride_x // 16) * 16
        stride_q = (stride_q // 16) * 16
    offs = tl.arange(0, BLOCK_K)
    largest = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for first in range(0, width, BLOCK_K):
        cols = first + offs
        mask = cols < width
        x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            x *= tl.load(column_ptr + cols, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.div_rn(tl.max(largest, axis=0), LARGEST), SMALLEST)
    tl.store(scale_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    for first in range(0, width, BLOCK_K):
        cols = first + offs
        mask = cols < width
        x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            x *= tl.load(column_ptr + cols, mask=mask, other=0.0)
        tl.store(q_ptr + row * stride_q + cols, (x * inverse).to(tl.float8e4nv), mask=mask)


@triton.jit(do_not_specialize=["O", "I", "stride_w", "stride_q"])
def _quantize_transposed_kernel(  # type: ignore[no-untyped-def]
    w_ptr,  # [O, I]
    scale_ptr,  # float32 [O]
    q_ptr,  # e4m3 [I, O]
    O,  # noqa: E741
    I,  # noqa: E741
    stride_w,
    stride_q,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """q[i, o] = round(w[o, i] / scale[o]), a tile per program."""
    rows, columns = O, I
    if ALIGNED:
        rows = (O // 16) * 16
        columns = (I // 16) * 16
        stride_w = (stride_w // 16) * 16
        stride_q = (stride_q // 16) * 16
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_o, mask_i = offs_o < rows, offs_i < columns
    mask = mask_o[:, None] & mask_i[None, :]
    w = tl.load(w_ptr + offs_o.to(tl.int64)[:, None] * stride_w + offs_i[None, :], mask=mask, other=0.0)
    inverse = tl.div_rn(1.0, tl.load(scale_ptr + offs_o, mask=mask_o, other=1.0))
    q = (w.to(tl.float32) * inverse[:, None]).to(tl.float8e4nv)
    target = q_ptr + offs_i.to(tl.int64)[:, None] * stride_q + offs_o[None, :]
    tl.store(target, tl.trans(q), mask=mask_i[:, None] & mask_o[None, :])


def quantize_rows(
    x: torch.Tensor,
    column: torch.Tensor | None,
    out: torch.Tensor,
    scale: torch.Tensor,
    largest: float,
    smallest_scale: float,
) -> None:
    """See :func:`gisp_kernels.ops.float8.quantize_rows`; fills ``out`` and ``scale``."""
    check_writable("out", out)
    check_writable("scale", scale)
    x = readable(x)
    rows, width = x.shape
    if rows == 0:
        return
    numbers = width, x.stride(0), out.stride(0)
    block, warps = WIDE_ROW if width > WIDE else ROW
    run(
        _quantize_rows_kernel,
        (rows,),
        (x, scale if column is None else readable(column), out, scale),
        numbers,
        (column is not None, largest, smallest_scale, block, aligned(*numbers)),
        num_warps=warps,
    )


def quantize_transposed(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """See :func:`gisp_kernels.ops.float8.quantize_transposed`; fills ``out``."""
    check_writable("out", out)
    weight = readable(weight)
    rows, width = weight.shape
    if rows == 0 or width == 0:
        return
    numbers = rows, width, weight.stride(0), out.stride(0)
    run(
        _quantize_transposed_kernel,
        (ceil_div(width, BLOCK_I), ceil_div(rows, BLOCK_O)),
        (weight, readable(scale), out),
        numbers,
        (BLOCK_O, BLOCK_I, aligned(*numbers)),
        num_warps=TILE_WARPS,
    )
