"""SwiGLU forward and in-place backward over tiles of a row; the width is an ordinary argument."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import aligned, readable, readable_rows, writable_rows
from gisp_kernels.forms import ceil_div, run

TILE = 1024
# With gate gradients a step takes so many tokens of a tile of columns.
BLOCK_T, BLOCK_C = 16, 128


@triton.jit(do_not_specialize=["I", "stride_g", "stride_u", "stride_a"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    act_ptr,
    I,  # noqa: E741
    stride_g,
    stride_u,
    stride_a,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    width = I
    if ALIGNED:
        width = (I // 16) * 16
        stride_g = (stride_g // 16) * 16
        stride_u = (stride_u // 16) * 16
        stride_a = (stride_a // 16) * 16
    tiles = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    offs = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    gate = tl.load(gate_ptr + row * stride_g + offs, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * stride_u + offs, mask=mask, other=0.0)
    g = gate.to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(gate.dtype)
    tl.store(act_ptr + row * stride_a + offs, silu.to(tl.float32) * up.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["I", "stride_g", "stride_u", "stride_a"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,  # becomes its gradient
    up_ptr,  # becomes its gradient
    act_ptr,  # dL/d(act), becomes act
    I,  # noqa: E741
    stride_g,
    stride_u,
    stride_a,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    width = I
    if ALIGNED:
        width = (I // 16) * 16
        stride_g = (stride_g // 16) * 16
        stride_u = (stride_u // 16) * 16
        stride_a = (stride_a // 16) * 16
    tiles = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    offs = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    gate_ptrs = gate_ptr + row * stride_g + offs
    up_ptrs = up_ptr + row * stride_u + offs
    act_ptrs = act_ptr + row * stride_a + offs
    gate = tl.load(gate_ptrs, mask=mask, other=0.0)
    g = gate.to(tl.float32)
    u = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(act_ptrs, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    tl.store(gate_ptrs, grad * u * sigmoid * (1 + g * (1 - sigmoid)), mask=mask)
    tl.store(up_ptrs, grad * silu, mask=mask)
    tl.store(act_ptrs, silu.to(gate.dtype).to(tl.float32) * u, mask=mask)


@triton.jit(do_not_specialize=["S", "I", "stride_g", "stride_u", "stride_a", "stride_ob", "stride_oi"])
def _gates_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,  # [B * S, I], becomes its gradient
    up_ptr,  # [B * S, I], becomes its gradient
    act_ptr,  # [B * S, I], dL/d(act)
    scale_ptr,  # [I], unused without SCALED
    out_ptr,  # float32 [B, I]
    S,
    I,  # noqa: E741
    stride_g,
    stride_u,
    stride_a,
    stride_ob,
    stride_oi,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The backward and ``out = sum act * grad`` over a sequence's tokens, in order, a tile of columns a program."""
    width = I
    if ALIGNED:
        width = (I // 16) * 16
        stride_g = (stride_g // 16) * 16
        stride_u = (stride_u // 16) * 16
        stride_a = (stride_a // 16) * 16
    tiles = tl.cdiv(width, BLOCK_C)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    cols = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_width = cols < width
    scale = tl.full((BLOCK_C,), 1.0, tl.float32)
    if SCALED:
        scale = tl.load(scale_ptr + cols, mask=in_width, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for first in range(0, S, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        mask = (tokens < S)[:, None] & in_width[None, :]
        rows = (sequence * S + tokens)[:, None]
        gate_ptrs = gate_ptr + rows * stride_g + cols[None, :]
        up_ptrs = up_ptr + rows * stride_u + cols[None, :]
        gate = tl.load(gate_ptrs, mask=mask, other=0.0)
        up = tl.load(up_ptrs, mask=mask, other=0.0)
        raw = tl.load(act_ptr + rows * stride_a + cols[None, :], mask=mask, other=0.0)
        g, u, grad = gate.to(tl.float32), up.to(tl.float32), raw.to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        act = (silu.to(gate.dtype).to(tl.float32) * u).to(gate.dtype).to(tl.float32)
        total += act * grad
        if SCALED:
            grad = (grad * scale[None, :]).to(raw.dtype).to(tl.float32)
        tl.store(gate_ptrs, grad * u * sigmoid * (1 + g * (1 - sigmoid)), mask=mask)
        tl.store(up_ptrs, grad * silu, mask=mask)
    tl.store(out_ptr + sequence * stride_ob + cols.to(tl.int64) * stride_oi, tl.sum(total, axis=0), mask=in_width)


def forward(gate: torch.Tensor, up: torch.Tensor, act: torch.Tensor) -> None:
    """See :func:`gisp_kernels.ops.decoder.swiglu`; fills ``act``."""
    pitch_a = writable_rows("out", act)
    gate, pitch_g = readable_rows(gate)
    up, pitch_u = readable_rows(up)
    _launch(_forward_kernel, (gate, up, act), (pitch_g, pitch_u, pitch_a))


def backward(gate: torch.Tensor, up: torch.Tensor, grad_act: torch.Tensor) -> None:
    """See :func:`gisp_kernels.ops.decoder.swiglu_backward_`."""
    strides = writable_rows("gate", gate), writable_rows("up", up), writable_rows("grad_act", grad_act)
    _launch(_backward_kernel, (gate, up, grad_act), strides)


def backward_gates(
    gate: torch.Tensor,
    up: torch.Tensor,
    grad_act: torch.Tensor,
    length: int,
    scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """See :func:`gisp_kernels.ops.decoder.swiglu_backward_gates_`; fills ``out``."""
    pitch_g, pitch_u = writable_rows("gate", gate), writable_rows("up", up)
    grad_act, pitch_a = readable_rows(grad_act)
    tokens, width = gate.shape
    if width == 0 or out.shape[0] == 0:
        return
    strides = (pitch_g, pitch_u, pitch_a)
    run(
        _gates_kernel,
        (ceil_div(width, BLOCK_C) * (tokens // length),),
        (gate, up, grad_act, out if scale is None else readable(scale), out),
        (length, width, *strides, *out.stride()),
        (scale is not None, aligned(width, *strides), BLOCK_T, BLOCK_C),
        num_warps=4,
    )


def _launch(kernel: triton.JITFunction, tensors: tuple[torch.Tensor, ...], strides: tuple[int, ...]) -> None:
    tokens, width = tensors[0].shape
    if tokens == 0 or width == 0:
        return
    grid = (ceil_div(width, TILE) * tokens,)
    run(kernel, grid, tensors, (width, *strides), (aligned(width, *strides), TILE), num_warps=4)
