"""``out[b, s] = sum X * dX`` over the tokens of sequence ``b`` and the columns of structure ``s``, one read of both.

A program sums one sequence for a tile of columns, tokens in order, so equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import aligned, readable

# The kernels are bound by memory. A step takes BLOCK_T tokens of a tile of BLOCK_C columns.
BLOCK_T = 32
BLOCK_C = 64
STAGES = 3
WARPS = 4
# Neither strides nor extents are part of a compiled kernel.
STRIDES = ["stride_xb", "stride_xt", "stride_gb", "stride_gt", "stride_ob", "stride_os"]


@triton.jit(do_not_specialize=["S", "I", *STRIDES])
def _channels_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, S, I]
    g_ptr,  # [B, S, I]
    out_ptr,  # float32 [B, I]
    S,
    I,  # noqa: E741
    stride_xb,
    stride_xt,
    stride_gb,
    stride_gt,
    stride_ob,
    stride_os,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A structure is one column."""
    width = I
    if ALIGNED:
        # Widths are no part of the compiled kernel; this tells it that 16-byte loads are safe.
        width = (I // 16) * 16
        stride_xb = (stride_xb // 16) * 16
        stride_xt = (stride_xt // 16) * 16
        stride_gb = (stride_gb // 16) * 16
        stride_gt = (stride_gt // 16) * 16
    tiles = tl.cdiv(width, BLOCK_C)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    cols = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens = tl.arange(0, BLOCK_T)
    x_tile = x_ptr + row * stride_xb + cols[None, :]
    g_tile = g_ptr + row * stride_gb + cols[None, :]
    in_width = (cols < width)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for first in tl.range(0, S, BLOCK_T, num_stages=STAGES):
        offs = (first + tokens).to(tl.int64)[:, None]
        mask = ((first + tokens) < S)[:, None] & in_width
        x = tl.load(x_tile + offs * stride_xt, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_tile + offs * stride_gt, mask=mask, other=0.0).to(tl.float32)
        total += x * g
    sums = tl.sum(total, axis=0)
    tl.store(out_ptr + row * stride_ob + cols.to(tl.int64) * stride_os, sums, mask=cols < width)


@triton.jit(do_not_specialize=["S", "count", "block", *STRIDES])
def _heads_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, S, count * block]
    g_ptr,  # [B, S, count * block]
    out_ptr,  # float32 [B, count]
    S,
    count,
    block,
    stride_xb,
    stride_xt,
    stride_gb,
    stride_gt,
    stride_ob,
    stride_os,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A structure is ``block`` columns: one program sums them all, a tile of columns after another."""
    if ALIGNED:
        block = (block // 16) * 16
        stride_xb = (stride_xb // 16) * 16
        stride_xt = (stride_xt // 16) * 16
        stride_gb = (stride_gb // 16) * 16
        stride_gt = (stride_gt // 16) * 16
    row = (tl.program_id(0) // count).to(tl.int64)
    structure = (tl.program_id(0) % count).to(tl.int64)
    x_base = x_ptr + row * stride_xb + structure * block
    g_base = g_ptr + row * stride_gb + structure * block
    tokens = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for left in range(0, block, BLOCK_C):
        cols = left + tl.arange(0, BLOCK_C)
        in_block = (cols < block)[None, :]
        for first in range(0, S, BLOCK_T):
            offs = (first + tokens).to(tl.int64)[:, None]
            mask = ((first + tokens) < S)[:, None] & in_block
            x = tl.load(x_base + offs * stride_xt + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_base + offs * stride_gt + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            total += x * g
    tl.store(out_ptr + row * stride_ob + structure * stride_os, tl.sum(tl.sum(total, axis=1), axis=0))


def launch(out: torch.Tensor, input: torch.Tensor, grad_input: torch.Tensor, block: int) -> None:
    """Write the sums; arguments as checked by :func:`gisp_kernels.ops.gate_grads.gate_grads`."""
    if out.numel() == 0:
        return
    x, grad = readable(input), readable(grad_input)
    sequences, length, width = x.shape
    strides = (*x.stride()[:2], *grad.stride()[:2])
    fits = aligned(width, *strides)
    settings = {"BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C, "num_warps": WARPS}
    with torch.cuda.device_of(x):
        if block == 1:
            _channels_kernel[(triton.cdiv(width, BLOCK_C) * sequences,)](
                x, grad, out, length, width, *strides, *out.stride(), STAGES=STAGES, ALIGNED=fits, **settings
            )
        else:
            count, fits = out.shape[1], fits and aligned(block)
            _heads_kernel[(count * sequences,)](
                x, grad, out, length, count, block, *strides, *out.stride(), ALIGNED=fits, **settings
            )
