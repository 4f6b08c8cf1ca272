"""``out[s] += sum |W * G| ** POWER`` over the rows or columns of structure ``s``, one read of W and G.

Rows are summed whole. Columns are summed in strips, whose partial sums, like those of the rows of a larger structure,
a second kernel adds in a fixed order. No atomics, and nothing depends on the number of multiprocessors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import aligned
from gisp_kernels.forms import ceil_div, next_power_of_2, run

# A program sums so many partials per iteration: lanes along the matrix, and strips loaded side by side because a
# loop over them one by one would wait for memory each time.
FINISH_LANES = 128
FINISH_STRIPS = 16


# The kernels are bound by memory: what counts is how many bytes are under way at a time. These settings were the
# fastest of those compared on an H200 at 13B and 8B shapes. By rows a program sums BLOCK_O rows in steps of BLOCK_I
# columns, by columns a strip of REPEATS * BLOCK_O rows and BLOCK_I columns; STAGES steps are in flight.
ROWS = {"BLOCK_O": 2, "BLOCK_I": 1024, "STAGES": 4}
ROW_WARPS = 4
COLUMNS = {"BLOCK_O": 8, "BLOCK_I": 128, "REPEATS": 16, "STAGES": 4}
COLUMN_WARPS = 2


@triton.jit(do_not_specialize=["O", "I", "stride_wo", "stride_go", "stride_sum"])
def _sum_rows_kernel(  # type: ignore[no-untyped-def]
    w_ptr,  # [O, I]
    g_ptr,  # [O, I]
    sums_ptr,  # float32 [O], any stride
    O,  # noqa: E741
    I,  # noqa: E741
    stride_wo,
    stride_wi,
    stride_go,
    stride_gi,
    stride_sum,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
    POWER: tl.constexpr,
):
    """sums[o] = or (ADD) += sum over all columns of |W[o, i] * G[o, i]| ** POWER, POWER 1 or 2."""
    width = I
    if ALIGNED:
        # Widths are no part of the compiled kernel; this tells it that 16-byte loads are safe.
        width = (I // 16) * 16
        stride_wo = (stride_wo // 16) * 16
        stride_go = (stride_go // 16) * 16
    offs_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tl.arange(0, BLOCK_I)
    w_rows = w_ptr + offs_o.to(tl.int64)[:, None] * stride_wo
    g_rows = g_ptr + offs_o.to(tl.int64)[:, None] * stride_go
    mask_o = offs_o < O
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for first in tl.range(0, width, BLOCK_I, num_stages=STAGES):
        cols = first + offs_i
        mask = mask_o[:, None] & (cols < width)[None, :]
        w = tl.load(w_rows + cols.to(tl.int64)[None, :] * stride_wi, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_rows + cols.to(tl.int64)[None, :] * stride_gi, mask=mask, other=0.0).to(tl.float32)
        if POWER == 1:
            total += tl.abs(w * g)
        else:
            total += (w * g) * (w * g)
    sums = sums_ptr + offs_o.to(tl.int64) * stride_sum
    row_sums = tl.sum(total, axis=1)
    if ADD:
        row_sums += tl.load(sums, mask=mask_o, other=0.0)
    tl.store(sums, row_sums, mask=mask_o)


@triton.jit(do_not_specialize=["O", "I", "stride_wo", "stride_go"])
def _sum_columns_kernel(  # type: ignore[no-untyped-def]
    w_ptr,  # [O, I]
    g_ptr,  # [O, I]
    partials_ptr,  # float32 [strips along O, I]
    O,  # noqa: E741
    I,  # noqa: E741
    stride_wo,
    stride_wi,
    stride_go,
    stride_gi,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    REPEATS: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
    POWER: tl.constexpr,
):
    """partials[strip, i] = sum over the strip's rows of |W[o, i] * G[o, i]| ** POWER, POWER 1 or 2."""
    width = I
    if ALIGNED:
        width = (I // 16) * 16
        stride_wo = (stride_wo // 16) * 16
        stride_go = (stride_go // 16) * 16
    strip = tl.program_id(1)
    offs_o = strip * BLOCK_O * REPEATS + tl.arange(0, BLOCK_O)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    w_cols = w_ptr + offs_i.to(tl.int64)[None, :] * stride_wi
    g_cols = g_ptr + offs_i.to(tl.int64)[None, :] * stride_gi
    mask_i = offs_i < width
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for r in tl.range(0, REPEATS, num_stages=STAGES):
        rows = offs_o + r * BLOCK_O
        mask = (rows < O)[:, None] & mask_i[None, :]
        w = tl.load(w_cols + rows.to(tl.int64)[:, None] * stride_wo, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_cols + rows.to(tl.int64)[:, None] * stride_go, mask=mask, other=0.0).to(tl.float32)
        if POWER == 1:
            total += tl.abs(w * g)
        else:
            total += (w * g) * (w * g)
    tl.store(partials_ptr + strip.to(tl.int64) * I + offs_i, tl.sum(total, axis=0), mask=mask_i)


@triton.jit(do_not_specialize=["count", "block", "strips", "pitch"])
def _finish_kernel(  # type: ignore[no-untyped-def]
    partials_ptr,  # float32 [strips, count * block], strips pitch apart
    out_ptr,  # float32 [count], any stride
    count,
    block,
    strips,
    pitch,
    stride_out,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[s] += sum of the partials of all lines of s over all strips, always in the same order."""
    lanes = tl.arange(0, BLOCK_S * BLOCK_L)
    structure = tl.program_id(0) * BLOCK_S + lanes // BLOCK_L
    offs_k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK_S * BLOCK_L), dtype=tl.float32)
    for first_line in range(0, block, BLOCK_L):
        line = first_line + lanes % BLOCK_L
        column = structure.to(tl.int64) * block + line
        mask_l = (structure < count) & (line < block)
        for first_strip in range(0, strips, BLOCK_K):
            strip = first_strip + offs_k
            partials = partials_ptr + strip.to(tl.int64)[:, None] * pitch + column[None, :]
            total += tl.load(partials, mask=(strip < strips)[:, None] & mask_l[None, :], other=0.0)
    per_lane = tl.sum(total, axis=0)
    scores = tl.sum(tl.reshape(per_lane, (BLOCK_S, BLOCK_L)), axis=1)
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    out_ptrs = out_ptr + offs_s.to(tl.int64) * stride_out
    tl.store(out_ptrs, tl.load(out_ptrs, mask=offs_s < count, other=0.0) + scores, mask=offs_s < count)


def finish(out: torch.Tensor, partials: torch.Tensor, block: int) -> None:
    """Add partial sums [strips, count * block], rows contiguous, to ``out`` [count] in a fixed order."""
    strips = partials.shape[0]
    lines = min(FINISH_LANES, next_power_of_2(block))
    structures = FINISH_LANES // lines
    run(
        _finish_kernel,
        (ceil_div(out.shape[0], structures),),
        (partials, out),
        (out.shape[0], block, strips, partials.stride(0), out.stride(0)),
        (structures, lines, FINISH_STRIPS),
        num_warps=4,
    )


def launch(out: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, axis: str, block: int, power: int) -> None:
    """Add ``sum |weight * grad| ** power`` of every structure to ``out``; arguments as validated by the op."""
    if weight.stride(1) != 1 and weight.stride(0) == 1:
        weight, grad, axis = weight.t(), grad.t(), "column" if axis == "row" else "row"
    rows, width = weight.shape
    if rows == 0 or width == 0:
        return
    numbers = rows, width, *weight.stride(), *grad.stride()
    fits = aligned(width, weight.stride(0), grad.stride(0))
    if axis == "row":
        # A row that is a structure adds its sum to the score at once.
        sums = out if block == 1 else torch.empty(rows, dtype=torch.float32, device=weight.device)
        run(
            _sum_rows_kernel,
            (ceil_div(rows, ROWS["BLOCK_O"]),),
            (weight, grad, sums),
            (*numbers, sums.stride(0)),
            (*ROWS.values(), block == 1, fits, power),
            num_warps=ROW_WARPS,
        )
        partials = sums.unsqueeze(0)
    else:
        strips = ceil_div(rows, COLUMNS["BLOCK_O"] * COLUMNS["REPEATS"])
        partials = torch.empty((strips, width), dtype=torch.float32, device=weight.device)
        run(
            _sum_columns_kernel,
            (ceil_div(width, COLUMNS["BLOCK_I"]), strips),
            (weight, grad, partials),
            numbers,
            (*COLUMNS.values(), fits, power),
            num_warps=COLUMN_WARPS,
        )
    if axis == "column" or block > 1:
        finish(out, partials, block)
