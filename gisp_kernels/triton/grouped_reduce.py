"""``out[s] = sum |W * G| ** POWER`` over all matrices that structures own rows or columns of, in one read of them all.

One launch goes through the matrices of a layer, whatever their shapes and axes; a second one adds the sums of their
regions in a fixed order and writes every result, or adds to it. A small matrix alone leaves much of a large GPU idle in
its last wave, and launches cost what it takes to read a few megabytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import aligned, readable
from gisp_kernels.forms import ceil_div, run_grouped
from gisp_kernels.triton.abs_weighted_reduce import FINISH_LANES


@dataclass(frozen=True)
class RegionConfig:
    """What a program sums: ``repeats`` tiles, one after another along the extent that is summed.

    Attributes:
        block_o, block_i: tile, rows and columns of the weight.
        repeats: tiles of a program.
        num_warps, num_stages: warps per program and tiles in flight.
    """

    block_o: int
    block_i: int
    repeats: int
    num_warps: int
    num_stages: int


# The kernel is bound by memory. Of those compared on an H200 at half an 8B layer this was the fastest with few partial
# sums.
REGION = RegionConfig(block_o=4, block_i=512, repeats=16, num_warps=4, num_stages=5)
# Strips of partial sums that a program loads side by side.
GROUP_STRIPS = 32
# Matrices of one launch.
MAX_MATRICES = 8


@triton.jit
def _number(told):  # type: ignore[no-untyped-def]
    """What :func:`_told` told."""
    return told // 16


@triton.jit
def _wide(told):  # type: ignore[no-untyped-def]
    return tl.cast(told, tl.int64) // 16


@triton.jit
def _grouped_sums_kernel(  # type: ignore[no-untyped-def]
    w_ptrs,  # tuple of [E, O, I]
    g_ptrs,  # tuple of [E, O, I]
    partials_ptr,  # float32, from offset on: [regions along I, E * O] by rows, [regions along O, E * I] by columns
    numbers,  # of every matrix ten, as of _told: first program, offset, whether by rows, E, O, I, strides of E and O
    ITEMS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    REPEATS: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
    POWER: tl.constexpr,
):
    """Sums of regions of |W * G| ** POWER, POWER 1 or 2; a program owns one region of one matrix."""
    pid = tl.program_id(0)
    w_ptr = w_ptrs[0]
    g_ptr = g_ptrs[0]
    first = _number(numbers[0])
    offset = _wide(numbers[1])
    along = _number(numbers[2])
    experts = _number(numbers[3])
    height = _number(numbers[4])
    width = _number(numbers[5])
    stride_we = _wide(numbers[6])
    stride_wo = _number(numbers[7])
    stride_ge = _wide(numbers[8])
    stride_go = _number(numbers[9])
    for item in tl.static_range(1, ITEMS):
        if pid >= _number(numbers[10 * item]):
            w_ptr = w_ptrs[item]
            g_ptr = g_ptrs[item]
            first = _number(numbers[10 * item])
            offset = _wide(numbers[10 * item + 1])
            along = _number(numbers[10 * item + 2])
            experts = _number(numbers[10 * item + 3])
            height = _number(numbers[10 * item + 4])
            width = _number(numbers[10 * item + 5])
            stride_we = _wide(numbers[10 * item + 6])
            stride_wo = _number(numbers[10 * item + 7])
            stride_ge = _wide(numbers[10 * item + 8])
            stride_go = _number(numbers[10 * item + 9])
    if ALIGNED:
        # Widths are no part of the compiled kernel; this tells it that 16-byte loads are safe.
        width = (width // 16) * 16
        stride_we = (stride_we // 16) * 16
        stride_wo = (stride_wo // 16) * 16
        stride_ge = (stride_ge // 16) * 16
        stride_go = (stride_go // 16) * 16
    step_o = tl.where(along != 0, 0, BLOCK_O)
    step_i = tl.where(along != 0, BLOCK_I, 0)
    tall = tl.where(along != 0, BLOCK_O, BLOCK_O * REPEATS)
    wide = tl.where(along != 0, BLOCK_I * REPEATS, BLOCK_I)
    regions_o = tl.cdiv(height, tall)
    regions_i = tl.cdiv(width, wide)
    local = pid - first
    region_i = local % regions_i
    region_o = (local // regions_i) % regions_o
    expert = (local // regions_i // regions_o).to(tl.int64)
    left = tl.where(along != 0, width - region_i * wide, height - region_o * tall)
    steps = tl.minimum(REPEATS, tl.cdiv(left, tl.where(along != 0, BLOCK_I, BLOCK_O)))
    offs_o = region_o * tall + tl.arange(0, BLOCK_O)
    offs_i = region_i * wide + tl.arange(0, BLOCK_I)
    w_base = w_ptr + expert * stride_we
    g_base = g_ptr + expert * stride_ge
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        o = offs_o + step * step_o
        i = offs_i + step * step_i
        mask = (o < height)[:, None] & (i < width)[None, :]
        w = tl.load(w_base + o.to(tl.int64)[:, None] * stride_wo + i[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_base + o.to(tl.int64)[:, None] * stride_go + i[None, :], mask=mask, other=0.0).to(tl.float32)
        if POWER == 1:
            total += tl.abs(w * g)
        else:
            total += (w * g) * (w * g)
    if along != 0:
        own = partials_ptr + offset + (region_i.to(tl.int64) * experts + expert) * height
        tl.store(own + offs_o, tl.sum(total, axis=1), mask=offs_o < height)
    else:
        own = partials_ptr + offset + (region_o.to(tl.int64) * experts + expert) * width
        tl.store(own + offs_i, tl.sum(total, axis=0), mask=offs_i < width)


def partial_sums(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    axes: Sequence[str],
    power: int,
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Sums of regions of every matrix, one launch: float32 [all], and of every matrix where its own begin and their
    strips, [strips, lines].

    Args:
        weights, grads: [E, O, I] each, rows contiguous, no extent 0, one dtype each.
        axes: ``"row"`` or ``"column"`` of each.
    """
    numbers: list[int] = []
    regions, programs, total = [], 0, 0
    for weight, grad, axis in zip(weights, grads, axes, strict=True):
        count, height, width = weight.shape
        by_row = axis == "row"
        tall = REGION.block_o * (1 if by_row else REGION.repeats)
        wide = REGION.block_i * (REGION.repeats if by_row else 1)
        regions_o, regions_i = ceil_div(height, tall), ceil_div(width, wide)
        strips, lines = (regions_i, count * height) if by_row else (regions_o, count * width)
        numbers += [programs, total, int(by_row), count, height, width, *weight.stride()[:2], *grad.stride()[:2]]
        regions.append((total, strips))
        programs += count * regions_o * regions_i
        total += strips * lines
    partials = torch.empty(total, dtype=torch.float32, device=weights[0].device)
    extents = [n for t in (*weights, *grads) for n in (t.shape[2], *t.stride()[:2])]
    tile = REGION.block_o, REGION.block_i, REGION.repeats, REGION.num_stages
    run_grouped(
        _grouped_sums_kernel,
        (programs,),
        (tuple(weights), tuple(grads), partials),
        (_told(numbers),),
        (len(weights), *tile, aligned(*extents), power),
        num_warps=REGION.num_warps,
    )
    return partials, regions


@triton.jit
def _finish_group_kernel(  # type: ignore[no-untyped-def]
    partials_ptr,  # float32, from the offset of every matrix on: [strips, count * block]
    out_ptrs,  # tuple of float32 [count], any stride
    results,  # of every out the first program, count, stride and whether a program takes one structure; as of _told
    items,  # of every matrix the number of its out, offset, strips and block; as of _told
    ITEMS: tl.constexpr,
    OUTS: tl.constexpr,
    ADD: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[s] = or (ADD) += sum of all partials of s, matrix by matrix, always in the same order.

    A program takes one structure of several lines, or LANES structures of one line.
    """
    pid = tl.program_id(0)
    own = 0
    out_ptr = out_ptrs[0]
    first = _number(results[0])
    count = _number(results[1])
    stride_out = _number(results[2])
    alone = _number(results[3])
    for n in tl.static_range(1, OUTS):
        if pid >= _number(results[4 * n]):
            own = n
            out_ptr = out_ptrs[n]
            first = _number(results[4 * n])
            count = _number(results[4 * n + 1])
            stride_out = _number(results[4 * n + 2])
            alone = _number(results[4 * n + 3])
    local = (pid - first).to(tl.int64)
    lanes = tl.arange(0, LANES)
    offs_k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, LANES), dtype=tl.float32)
    for item in tl.static_range(ITEMS):
        if _number(items[4 * item]) == own:
            base = partials_ptr + _wide(items[4 * item + 1])
            strips = _number(items[4 * item + 2])
            block = _number(items[4 * item + 3])
            pitch = tl.cast(count, tl.int64) * block
            start = local * tl.where(alone != 0, block, LANES)
            stop = tl.minimum(start + tl.where(alone != 0, block, LANES), pitch)
            for left in range(0, tl.where(alone != 0, block, LANES), LANES):
                lines = start + left + lanes
                mask_l = lines < stop
                for top in range(0, strips, BLOCK_K):
                    strip = top + offs_k
                    partials = base + strip.to(tl.int64)[:, None] * pitch + lines[None, :]
                    total += tl.load(partials, mask=(strip < strips)[:, None] & mask_l[None, :], other=0.0)
    per_lane = tl.sum(total, axis=0)
    if alone != 0:
        score = tl.sum(per_lane, axis=0)
        place = out_ptr + local * stride_out
        if ADD:
            score += tl.load(place)
        tl.store(place, score)
    else:
        structure = local * LANES + lanes
        places = out_ptr + structure * stride_out
        if ADD:
            per_lane += tl.load(places, mask=structure < count, other=0.0)
        tl.store(places, per_lane, mask=structure < count)


def finish_group(
    outs: Sequence[torch.Tensor], partials: torch.Tensor, parts: Sequence[tuple[int, int, int, int]], add: bool
) -> None:
    """Write sums of partials to every ``out``, or add them to it, in a fixed order; one launch.

    Args:
        outs: float32 [count] each, any stride, none empty.
        partials: float32, contiguous.
        parts: of up to :data:`MAX_MATRICES` matrices the number of their ``out``, where their partials
            [strips, count * block] begin, strips and block.
    """
    results: list[int] = []
    programs = 0
    for number, out in enumerate(outs):
        alone = any(block > 1 for owner, _, _, block in parts if owner == number)
        results += [programs, out.shape[0], out.stride(0), int(alone)]
        programs += out.shape[0] if alone else ceil_div(out.shape[0], FINISH_LANES)
    run_grouped(
        _finish_group_kernel,
        (programs,),
        (partials, tuple(outs)),
        (_told(results), _told([number for part in parts for number in part])),
        (len(parts), len(outs), add, FINISH_LANES, GROUP_STRIPS),
        num_warps=4,
    )


def _told(numbers: Sequence[int]) -> tuple[int, ...]:
    """Integers for a kernel, which compiles those that are 1 or multiples of 16 into itself; none of these is."""
    return tuple(16 * number + 2 for number in numbers)


Job = tuple[torch.Tensor, torch.Tensor, torch.Tensor, str, int]


def launch(jobs: Sequence[Job], power: int, add: bool) -> None:
    """Write the sums of ``(weight, grad, out, axis, block)``, or add them; as checked by the op."""
    begun: set[int] = set()
    for batch in _batches([job for job in jobs if job[0].numel()]):
        operands = [_oriented(weight, grad, axis) for weight, grad, _, axis, _ in batch]
        weights, grads, axes = zip(*operands, strict=True)
        partials, regions = partial_sums(weights, grads, axes, power)
        # Results that an earlier batch began are added to.
        outs = {id(job[2]): job[2] for job in batch}
        for more in (False, True):
            place = {key: number for number, key in enumerate(k for k in outs if (add or k in begun) == more)}
            parts = [
                (place[id(out)], *region, block)
                for (_, _, out, _, block), region in zip(batch, regions, strict=True)
                if id(out) in place
            ]
            if parts:
                finish_group([outs[key] for key in place], partials, parts, more)
        begun.update(outs)
    for _, _, out, _, _ in jobs:
        if not add and id(out) not in begun:
            out.zero_()


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs of one launch, those with one result together where they fit."""
    alike: dict[object, list[Job]] = {}
    for job in jobs:
        alike.setdefault((job[0].device, job[0].dtype, job[1].dtype), []).append(job)
    for found in alike.values():
        batch: list[Job] = []
        for _, group in itertools.groupby(found, lambda job: id(job[2])):
            own = list(group)
            if batch and len(batch) + len(own) > MAX_MATRICES:
                yield batch
                batch = []
            batch += own
            while len(batch) > MAX_MATRICES:
                yield batch[:MAX_MATRICES]
                batch = batch[MAX_MATRICES:]
        yield batch


def _oriented(weight: torch.Tensor, grad: torch.Tensor, axis: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Operands [E, O, I] with contiguous rows, and the axis in them."""
    if weight.dim() == 2:
        weight, grad = weight.unsqueeze(0), grad.unsqueeze(0)
    # The gradient, which is float32 as a rule, is not copied for a weight that lies the other way round.
    if grad.stride(2) != 1 and grad.stride(1) == 1:
        weight, grad, axis = weight.mT, grad.mT, "column" if axis == "row" else "row"
    return readable(weight), readable(grad), axis
