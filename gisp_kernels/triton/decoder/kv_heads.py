"""Key/value heads copied to their query heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import aligned, check_writable, readable
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


def expand(kv: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """See :func:`gisp_kernels.ops.decoder.expand_kv`; fills ``out``."""
    tokens, heads, size = out.shape
    check_writable("out", out)
    if out.numel():
        kv = readable(kv)
        strides = (*kv.stride()[:2], *out.stride()[:2])
        operands = kv, readable(index), out
        grid = ceil_div(tokens, TOKENS), heads
        constants = size, next_power_of_2(size), TOKENS, aligned(size, *strides, to=8)
        run(_expand_kernel, grid, operands, (tokens, *strides), constants, num_warps=4)
