"""``out[b, s] = sum X * dX`` over the tokens of sequence ``b`` and the columns of structure ``s``, one read of both.

A program sums a part of a sequence for one structure, or for a tile of channels, tokens in order. Where sequences times
structures are too few to fill a GPU, sequences come in several parts, whose sums are then added in order. How many
depends on shapes alone, not on the GPU: equal inputs give equal bits anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import aligned, readable
from gisp_kernels.forms import ceil_div, run
from gisp_kernels.triton.grouped_reduce import finish_group


@dataclass(frozen=True)
class TileConfig:
    """What a program reads at a time.

    Attributes:
        block_t, block_c: tokens and columns per step.
        num_warps, num_stages: warps per program and steps in flight.
    """

    block_t: int
    block_c: int
    num_warps: int
    num_stages: int


# The kernel is bound by memory: what counts is how many bytes are under way at a time. These were the fastest of those
# compared on an H200 at 13B and 8B shapes, 2048 and 8192 tokens, and at those of SmolLM2. A program of few has to hold
# more bytes in flight.
CHANNELS = TileConfig(block_t=8, block_c=128, num_warps=2, num_stages=4)
FEW_CHANNELS = TileConfig(block_t=64, block_c=64, num_warps=4, num_stages=4)
HEADS = TileConfig(block_t=64, block_c=128, num_warps=4, num_stages=1)
NARROW_HEADS = TileConfig(block_t=64, block_c=64, num_warps=4, num_stages=4)
MANY_PROGRAMS = 256
# Sequences come in parts until there are so many programs, or parts have no more tokens than MIN_PART: adding the sums
# of parts is a launch of its own.
MIN_PROGRAMS = {HEADS: 256, NARROW_HEADS: 64, CHANNELS: 64, FEW_CHANNELS: 64}
MIN_PART = 256
# Neither strides nor extents are part of a compiled kernel.
RUNTIME = ["S", "part", "parts", "count", "block", "stride_xb", "stride_xt", "stride_gb", "stride_gt"]
STRIDES_OUT = ["stride_ob", "stride_op", "stride_os"]


@triton.jit(do_not_specialize=[*RUNTIME, *STRIDES_OUT])
def _gate_grads_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, S, count * block]
    g_ptr,  # [B, S, count * block]
    out_ptr,  # float32 [parts, B, count]
    S,
    part,  # tokens of a part
    parts,
    count,
    block,
    stride_xb,
    stride_xt,
    stride_gb,
    stride_gt,
    stride_ob,
    stride_op,
    stride_os,
    CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """CHANNELS: a structure is one column, and a program takes BLOCK_C of them; else it takes one structure."""
    # The columns of a program, and how many of them belong to it.
    if CHANNELS:
        tiles = tl.cdiv(count, BLOCK_C)
        extent = count
    else:
        tiles = count
        extent = block
    if ALIGNED:
        # Widths are no part of the compiled kernel; this tells it that 16-byte loads are safe.
        extent = (extent // 16) * 16
        stride_xb = (stride_xb // 16) * 16
        stride_xt = (stride_xt // 16) * 16
        stride_gb = (stride_gb // 16) * 16
        stride_gt = (stride_gt // 16) * 16
    tile = tl.program_id(0) % tiles
    number = (tl.program_id(0) // tiles) % parts
    row = (tl.program_id(0) // tiles // parts).to(tl.int64)
    start = number * part
    stop = tl.minimum(S, start + part)
    if CHANNELS:
        left = tile * BLOCK_C
        steps = 1
        base = tl.full((), 0, tl.int64)
    else:
        left = 0
        steps = tl.cdiv(extent, BLOCK_C)
        base = tile.to(tl.int64) * extent
    x_base = x_ptr + row * stride_xb + base
    g_base = g_ptr + row * stride_gb + base
    tokens = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for step in range(steps):
        cols = left + step * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (cols < extent)[None, :]
        for first in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
            offs = (first + tokens).to(tl.int64)[:, None]
            mask = ((first + tokens) < stop)[:, None] & inside
            x = tl.load(x_base + offs * stride_xt + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_base + offs * stride_gt + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            total += x * g
    sums = out_ptr + row * stride_ob + number.to(tl.int64) * stride_op
    if CHANNELS:
        cols = left + tl.arange(0, BLOCK_C)
        tl.store(sums + cols.to(tl.int64) * stride_os, tl.sum(total, axis=0), mask=cols < extent)
    else:
        tl.store(sums + tile.to(tl.int64) * stride_os, tl.sum(tl.sum(total, axis=1), axis=0))


def choose(sequences: int, length: int, count: int, block: int) -> tuple[TileConfig, int]:
    """Tiles, and parts of a sequence, for ``count`` structures of ``block`` columns."""
    if block > 1:
        config, tiles = HEADS if block > NARROW_HEADS.block_c else NARROW_HEADS, count
    else:
        many = sequences * ceil_div(count, CHANNELS.block_c) >= MANY_PROGRAMS
        config = CHANNELS if many else FEW_CHANNELS
        tiles = ceil_div(count, config.block_c)
    return config, max(1, min(-(-MIN_PROGRAMS[config] // (sequences * tiles)), length // MIN_PART))


def launch(out: torch.Tensor, input: torch.Tensor, grad_input: torch.Tensor, block: int) -> None:
    """Write the sums; arguments as checked by :func:`gisp_kernels.ops.gate_grads.gate_grads`."""
    if out.numel() == 0:
        return
    x, grad = readable(input), readable(grad_input)
    sequences, length, width = x.shape
    channels, count = block == 1, out.shape[1]
    config, parts = choose(sequences, length, count, block)
    tiles = ceil_div(width, config.block_c) if channels else count
    sums = out.unsqueeze(0) if parts == 1 else torch.empty((parts, *out.shape), dtype=out.dtype, device=out.device)
    strides = (*x.stride()[:2], *grad.stride()[:2])
    # Wider elements fill the shared memory of small GPUs with half as many.
    stages = config.num_stages if x.element_size() + grad.element_size() <= 4 else -(-config.num_stages // 2)
    fits = aligned(width, *strides) and (channels or aligned(block))
    run(
        _gate_grads_kernel,
        (sequences * parts * tiles,),
        (x, grad, sums),
        (length, -(-length // parts), parts, count, block, *strides, sums.stride(1), sums.stride(0), sums.stride(2)),
        (channels, config.block_t, config.block_c, stages, fits),
        num_warps=config.num_warps,
    )
    if parts > 1:
        whole = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        finish_group([whole.view(-1)], sums, [(0, 0, parts, 1)], add=False)
        if whole is not out:
            out.copy_(whole)
