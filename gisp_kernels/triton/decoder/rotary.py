"""Rotary embedding: each program turns the heads of a few tokens; both halves of a head are read before either is
written, so the result may overwrite the input. Backward, one launch sums shared keys and values and turns back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import aligned, check_writable, readable
from gisp_kernels.forms import ceil_div, next_power_of_2, run

LINES = 16
TOKENS = 16


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
    ALIGNED: tl.constexpr,
):
    """out = x * cos + rotate_half(x) * sin."""
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
    new_low = low * cos_low - high * sin_low
    new_high = high * cos_high + low * sin_high
    out = out_ptr + (token * stride_ot + head * stride_oh)[:, None] + offs[None, :]
    tl.store(out, new_low, mask=mask)
    tl.store(out + HALF, new_high, mask=mask)


RUNTIME = ["T", "H", "KV", "positions", "stride_qt", "stride_qh", "stride_kt", "stride_kh", "stride_vt", "stride_vh"]


@triton.jit(do_not_specialize=[*RUNTIME, "stride_ot"])
def _unrotate_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # [T, H, hd]
    k_ptr,  # [T, H, hd]
    v_ptr,  # [T, H, hd]
    cos_ptr,  # [S, hd]
    sin_ptr,  # [S, hd]
    index_ptr,  # int64 [H], unused without SHARED
    out_ptr,  # [T, (H + 2 KV) * hd]
    T,
    H,
    KV,
    positions,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program writes one head of a few tokens: of queries turned back, of keys also summed, of values only summed."""
    lines = H + 2 * KV
    line = tl.program_id(0) % lines
    grad_ptr = q_ptr
    own = line
    stride_t = tl.cast(stride_qt, tl.int64)
    stride_h = tl.cast(stride_qh, tl.int64)
    if line >= H:
        grad_ptr = k_ptr
        own = line - H
        stride_t = tl.cast(stride_kt, tl.int64)
        stride_h = tl.cast(stride_kh, tl.int64)
    if line >= H + KV:
        grad_ptr = v_ptr
        own = line - H - KV
        stride_t = tl.cast(stride_vt, tl.int64)
        stride_h = tl.cast(stride_vh, tl.int64)
    stride_o = tl.cast(stride_ot, tl.int64)
    if ALIGNED:
        stride_t = (stride_t // 8) * 8
        stride_h = (stride_h // 8) * 8
        stride_o = (stride_o // 8) * 8
    first = own
    stop = own + 1
    if SHARED:
        if line >= H:
            first = 0
            stop = H
    # Division in 32 bits is several times cheaper; only offsets need 64.
    token = (tl.program_id(0) // lines) * TOKENS + tl.arange(0, TOKENS)
    offs = tl.arange(0, BLOCK)
    mask = (token < T)[:, None] & (offs < HALF)[None, :]
    rows = token.to(tl.int64)[:, None]
    low = tl.zeros((TOKENS, BLOCK), tl.float32)
    high = tl.zeros((TOKENS, BLOCK), tl.float32)
    for head in range(first, stop):
        mine = True
        if SHARED:
            mine = (line < H) | (tl.load(index_ptr + head) == own)
        if mine:
            grad = grad_ptr + rows * stride_t + head * stride_h + offs[None, :]
            low += tl.load(grad, mask=mask, other=0.0).to(tl.float32)
            high += tl.load(grad + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    low = low.to(dtype).to(tl.float32)
    high = high.to(dtype).to(tl.float32)
    if line < H + KV:
        table = (token % positions)[:, None] * (2 * HALF) + offs[None, :]
        cos_low = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
        cos_high = tl.load(cos_ptr + table + HALF, mask=mask, other=0.0).to(tl.float32)
        sin_low = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
        sin_high = tl.load(sin_ptr + table + HALF, mask=mask, other=0.0).to(tl.float32)
        new_low = low * cos_low + high * sin_high
        high = high * cos_high - low * sin_low
        low = new_low
    out = out_ptr + rows * stride_o + line * (2 * HALF) + offs[None, :]
    tl.store(out, low, mask=mask)
    tl.store(out + HALF, high, mask=mask)


def launch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """See :func:`gisp_kernels.ops.decoder.rotary`."""
    tokens, heads, size = x.shape
    lines = tokens * heads
    check_writable("out", out)
    if lines == 0 or size == 0:
        return
    x, cos, sin = readable(x), cos.contiguous(), sin.contiguous()
    strides = (*x.stride()[:2], *out.stride()[:2])
    half = size // 2
    fits = aligned(*strides, half, to=8)
    run(
        _rotary_kernel,
        (ceil_div(lines, LINES),),
        (x, cos, sin, out),
        (lines, heads, cos.shape[0], *strides),
        (half, next_power_of_2(half), LINES, fits),
        num_warps=4,
    )


def unrotate(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor | None,
    kv_heads: int,
    out: torch.Tensor,
) -> None:
    """See :func:`gisp_kernels.ops.decoder.unrotate_qkv`; fills ``out``."""
    batch, heads, length, size = grads[0].shape
    tokens, lines = batch * length, heads + 2 * kv_heads
    if tokens == 0 or lines == 0:
        return
    readable_grads = [_by_token(grad) for grad in grads]
    strides: list[int] = []
    for grad in readable_grads:
        _, stride_h, stride_t, _ = grad.stride()
        strides += (stride_t, stride_h)
    pitch, half = out.stride(0), size // 2
    fits = aligned(*strides, pitch, half, to=8)
    operands = (*readable_grads, cos.contiguous(), sin.contiguous(), cos if index is None else readable(index), out)
    run(
        _unrotate_kernel,
        (ceil_div(tokens, TOKENS) * lines,),
        operands,
        (tokens, heads, kv_heads, length, *strides, pitch),
        (half, next_power_of_2(half), TOKENS, index is not None, fits),
        num_warps=4,
    )


def _by_token(grad: torch.Tensor) -> torch.Tensor:
    """[B, H, S, hd], copied if one stride does not lead from token to token of all sequences."""
    stride_b, _, stride_t, stride_d = grad.stride()
    if stride_d == 1 and (stride_b == grad.shape[2] * stride_t or grad.shape[0] == 1):
        return grad
    return grad.transpose(1, 2).contiguous().transpose(1, 2)
