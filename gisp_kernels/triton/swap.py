"""Swap pairs of blocks in place, one launch per tensor (the fallback of the compiled core, which needs one in all)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gisp_kernels.forms import ceil_div, next_power_of_2, run

# Elements of one program. Only these tile shapes exist, so nothing recompiles while a model shrinks.
TILE = 1024
MAX_COLUMNS = 256


# The grid is 1-D over tiles of (line, run) with the tiles of a run fastest; a line is one row of one pair.
@triton.jit(do_not_specialize=["n_lines", "n_pairs", "run", "pitch", "step", "tiles_per_run"])
def _swap_blocks_kernel(  # type: ignore[no-untyped-def]
    t_ptr,
    pairs_ptr,
    n_lines,
    n_pairs,
    run,
    pitch,
    step,
    tiles_per_run,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """t[a*step + row*pitch + r] <-> t[b*step + row*pitch + r] for every pair (a, b), row and r < run.

    pairs: int64 [n_pairs, 2], all indices different. Every element belongs to one lane of one program, which loads both
    sides before it stores: no order matters.
    """
    pid = tl.program_id(0).to(tl.int64)
    lines = (pid // tiles_per_run) * BLOCK_L + tl.arange(0, BLOCK_L).to(tl.int64)
    offs_r = (pid % tiles_per_run) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    mask_l = lines < n_lines
    pair = lines % n_pairs
    row = lines // n_pairs
    a = tl.load(pairs_ptr + 2 * pair, mask=mask_l, other=0)
    b = tl.load(pairs_ptr + 2 * pair + 1, mask=mask_l, other=0)
    mask = mask_l[:, None] & (offs_r < run)[None, :]
    inner = (row * pitch)[:, None] + offs_r[None, :]
    a_ptrs = t_ptr + (a * step)[:, None] + inner
    b_ptrs = t_ptr + (b * step)[:, None] + inner
    x = tl.load(a_ptrs, mask=mask)
    y = tl.load(b_ptrs, mask=mask)
    tl.store(a_ptrs, y, mask=mask)
    tl.store(b_ptrs, x, mask=mask)


def launch(tensors: list[torch.Tensor], pairs: list[torch.Tensor], layouts: Sequence[tuple[int, ...]]) -> None:
    """Swap ``pairs[i]`` (int64 CPU [n, 2], n > 0) in every integer tensor, all on one device.

    Args:
        layouts: for each tensor the fields of :class:`gisp_kernels.ops.swap.Layout`.
    """
    flat = torch.cat(pairs)
    if tensors[0].is_cuda:
        flat = flat.pin_memory().to(tensors[0].device, non_blocking=True)
    for tensor, own, layout in zip(tensors, flat.split([len(pair) for pair in pairs]), layouts, strict=True):
        _launch_one(tensor, own, layout)


def _launch_one(tensor: torch.Tensor, pairs: torch.Tensor, layout: tuple[int, ...]) -> None:
    _, rows, length, pitch, step = layout
    block_r = min(next_power_of_2(length), MAX_COLUMNS)
    block_l = TILE // block_r
    n_pairs = pairs.shape[0]
    n_lines = n_pairs * rows
    tiles_per_run = ceil_div(length, block_r)
    grid = (ceil_div(n_lines, block_l) * tiles_per_run,)
    numbers = n_lines, n_pairs, length, pitch, step, tiles_per_run
    run(_swap_blocks_kernel, grid, (tensor, pairs), numbers, (block_l, block_r), num_warps=4)
