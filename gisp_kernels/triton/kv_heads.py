"""Key/value heads copied to their query heads, and summed back: there every program looks at all heads and takes its
own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import check_writable, readable
from gisp_kernels.forms import ceil_div, next_power_of_2, run

TOKENS = 16


@triton.jit(do_not_specialize=["T", "stride_kt", "stride_kh", "stride_ot", "stride_oh"])
def _expand_kernel(  # type: ignore[no-untyped-def]
    kv_ptr,  # [T, KV, hd]
    index_ptr,  # int64 [H]
    out_ptr,  # [T, H, hd]
    T,
    stride_kt,
    stride_kh,
    stride_ot,
    stride_oh,
    HD: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out[t, h] = kv[t, index[h]]."""
    if ALIGNED:
        stride_kt = (stride_kt // 8) * 8
        stride_kh = (stride_kh // 8) * 8
        stride_ot = (stride_ot // 8) * 8
        stride_oh = (stride_oh // 8) * 8
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    offs = tl.arange(0, BLOCK)
    mask = (token < T)[:, None] & (offs < HD)[None, :]
    source = tl.load(index_ptr + head)
    value = tl.load(kv_ptr + (token * stride_kt + source * stride_kh)[:, None] + offs[None, :], mask=mask)
    tl.store(out_ptr + (token * stride_ot + head * stride_oh)[:, None] + offs[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["T", "H", "stride_gt", "stride_gh", "stride_ot", "stride_oh"])
def _sum_kv_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [T, H, hd]
    index_ptr,  # int64 [H]
    out_ptr,  # [T, KV, hd]
    T,
    H,
    stride_gt,
    stride_gh,
    stride_ot,
    stride_oh,
    HD: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out[t, j] = sum of grad[t, h] over the heads h with index[h] == j, ascending."""
    if ALIGNED:
        stride_gt = (stride_gt // 8) * 8
        stride_gh = (stride_gh // 8) * 8
        stride_ot = (stride_ot // 8) * 8
        stride_oh = (stride_oh // 8) * 8
    kv_head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    offs = tl.arange(0, BLOCK)
    mask = (token < T)[:, None] & (offs < HD)[None, :]
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    stride_h = tl.cast(stride_gh, tl.int64)
    for head in range(H):
        if tl.load(index_ptr + head) == kv_head:
            grad = grad_ptr + (token * stride_gt + head * stride_h)[:, None] + offs[None, :]
            total += tl.load(grad, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + (token * stride_ot + kv_head * stride_oh)[:, None] + offs[None, :]
    tl.store(out, total, mask=mask)


def _constants(size: int, *strides: int) -> tuple[int | bool, ...]:
    return size, next_power_of_2(size), TOKENS, all(extent % 8 == 0 for extent in (size, *strides))


def expand(kv: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """See :func:`gisp_kernels.ops.decoder.expand_kv`; fills ``out``."""
    tokens, heads, size = out.shape
    check_writable("out", out)
    if out.numel():
        kv = readable(kv)
        strides = (kv.stride(0), kv.stride(1), out.stride(0), out.stride(1))
        operands = kv, readable(index), out
        grid = ceil_div(tokens, TOKENS), heads
        run(_expand_kernel, grid, operands, (tokens, *strides), _constants(size, *strides), num_warps=4)


def sum_heads(grad: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """See :func:`gisp_kernels.ops.decoder.sum_kv`; fills ``out``."""
    tokens, kv_heads, size = out.shape
    check_writable("out", out)
    if out.numel():
        grad = readable(grad)
        strides = (grad.stride(0), grad.stride(1), out.stride(0), out.stride(1))
        operands = grad, readable(index), out
        grid, numbers = (ceil_div(tokens, TOKENS), kv_heads), (tokens, grad.shape[1], *strides)
        run(_sum_kv_kernel, grid, operands, numbers, _constants(size, *strides), num_warps=4)
