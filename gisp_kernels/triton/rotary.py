"""Rotary embedding: each program turns the heads of a few tokens; both halves of a head are read before either is
written, so the result may overwrite the input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import check_writable, readable
from gisp_kernels.forms import ceil_div, next_power_of_2, run

LINES = 16


@triton.jit(do_not_specialize=["lines", "heads", "positions", "stride_xt", "stride_xh", "stride_ot", "stride_oh"])
def _rotary_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, H, hd]
    cos_ptr,  # [S, hd]
    sin_ptr,  # [S, hd]
    out_ptr,  # [T, H, hd]
    lines,  # T * H
    heads,
    positions,
    stride_xt,
    stride_xh,
    stride_ot,
    stride_oh,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    INVERSE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out = x * cos + rotate_half(x) * sin, or the transposed map."""
    if ALIGNED:
        stride_xt = (stride_xt // 8) * 8
        stride_xh = (stride_xh // 8) * 8
        stride_ot = (stride_ot // 8) * 8
        stride_oh = (stride_oh // 8) * 8
    # Division in 32 bits is several times cheaper; only offsets need 64.
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    position = (line // heads) % positions
    token = (line // heads).to(tl.int64)
    head = (line % heads).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = (line < lines)[:, None] & (offs < HALF)[None, :]
    table = position[:, None] * (2 * HALF) + offs[None, :]
    cos_low = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + table + HALF, mask=mask, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + table + HALF, mask=mask, other=0.0).to(tl.float32)
    x = x_ptr + (token * stride_xt + head * stride_xh)[:, None] + offs[None, :]
    low = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        new_low = low * cos_low + high * sin_high
        new_high = high * cos_high - low * sin_low
    else:
        new_low = low * cos_low - high * sin_low
        new_high = high * cos_high + low * sin_high
    out = out_ptr + (token * stride_ot + head * stride_oh)[:, None] + offs[None, :]
    tl.store(out, new_low, mask=mask)
    tl.store(out + HALF, new_high, mask=mask)


def launch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool, out: torch.Tensor) -> None:
    """See :func:`gisp_kernels.ops.decoder.rotary`."""
    tokens, heads, size = x.shape
    lines = tokens * heads
    check_writable("out", out)
    if lines == 0 or size == 0:
        return
    x, cos, sin = readable(x), cos.contiguous(), sin.contiguous()
    strides = (x.stride(0), x.stride(1), out.stride(0), out.stride(1))
    half = size // 2
    fits = all(stride % 8 == 0 for stride in (*strides, half))
    run(
        _rotary_kernel,
        (ceil_div(lines, LINES),),
        (x, cos, sin, out),
        (lines, heads, cos.shape[0], *strides),
        (half, next_power_of_2(half), LINES, inverse, fits),
        num_warps=4,
    )
