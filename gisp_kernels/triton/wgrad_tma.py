"""``out[s] += sum |W * (dY^T X)|`` for large 16-bit weights on GPUs with a tensor memory accelerator (Hopper on).

As in :mod:`~gisp_kernels.triton.wgrad_importance` a tile of the weight gradient is formed over all tokens, met
with its tile of W and summed. Here programs are persistent and operands arrive by TMA: while one tile is being summed,
the operands of the next are already on their way. Structures are always rows of the product: for columns of W the
operands change places and W is turned round on its way into registers, because sums along a row stay inside a warp.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gisp_kernels.forms import ceil_div

# A program forms one tile of the gradient at a time: rows that belong to structures, the extent summed, tokens.
BLOCK_M, BLOCK_N, BLOCK_T = 128, 256, 64
GROUP_M = 8
NUM_WARPS, NUM_STAGES = 8, 3
MAX_LAYERS = 3
# The least shared memory of a program: the tiles of its products in flight, and a tile of 16-bit W.
SHARED_BYTES = 2 * (NUM_STAGES * BLOCK_T * (BLOCK_M + BLOCK_N) + BLOCK_M * BLOCK_N)


@triton.jit
def _load_weight(desc, m, n, BY_ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tile of W with structures along its rows."""
    if BY_ROW:
        tile = desc.load([m, n])
    else:
        tile = desc.load([n, m]).T
    return tile


@triton.jit(do_not_specialize=["T", "M0", "M1", "M2", "N", "start1", "start2", "programs"])
def _wgrad_tma_kernel(  # type: ignore[no-untyped-def]
    m_desc,  # [T, columns], boxes of BLOCK_T x BLOCK_M: the operand whose columns belong to structures
    n_desc,  # [T, N], boxes of BLOCK_T x BLOCK_N
    w0_desc,
    w1_desc,
    w2_desc,
    partials_ptr,  # float32 [tiles along N, M0 + M1 + M2]
    T,
    M0,
    M1,
    M2,
    N,
    start1,
    start2,
    programs,
    BY_ROW: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Tile sums of |W * (dY^T X)| for up to three layers side by side; every tile owns its slice of the workspace."""
    tiles_0 = tl.cdiv(M0, BLOCK_M)
    tiles_01 = tiles_0
    tiles_m = tiles_0
    width = M0
    if LAYERS > 1:
        tiles_01 = tiles_0 + tl.cdiv(M1, BLOCK_M)
        tiles_m = tiles_01
        width = M0 + M1
    if LAYERS > 2:
        tiles_m = tiles_01 + tl.cdiv(M2, BLOCK_M)
        width = M0 + M1 + M2
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(T, BLOCK_T)
    per_group = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=True):
        first_m = (tile // per_group) * GROUP_M
        group = tl.minimum(tiles_m - first_m, GROUP_M)
        tile_m = first_m + (tile % per_group) % group
        tile_n = (tile % per_group) // group
        n = tile_n * BLOCK_N
        # m is the row within the layer; its columns start at start in dY, its sums at first_sum in the workspace.
        m = tile_m * BLOCK_M
        rows = M0
        start = 0
        first_sum = 0
        if LAYERS > 1:
            if tile_m >= tiles_0:
                m = (tile_m - tiles_0) * BLOCK_M
                rows = M1
                start = start1
                first_sum = M0
        if LAYERS > 2:
            if tile_m >= tiles_01:
                m = (tile_m - tiles_01) * BLOCK_M
                rows = M2
                start = start2
                first_sum = M0 + M1
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            left = m_desc.load([step * BLOCK_T, start + m])
            right = n_desc.load([step * BLOCK_T, n])
            acc = tl.dot(left.T, right, acc)
        if LAYERS == 1:
            w = _load_weight(w0_desc, m, n, BY_ROW)
        elif LAYERS == 2:
            if tile_m < tiles_0:
                w = _load_weight(w0_desc, m, n, BY_ROW)
            else:
                w = _load_weight(w1_desc, m, n, BY_ROW)
        else:
            if tile_m < tiles_0:
                w = _load_weight(w0_desc, m, n, BY_ROW)
            elif tile_m < tiles_01:
                w = _load_weight(w1_desc, m, n, BY_ROW)
            else:
                w = _load_weight(w2_desc, m, n, BY_ROW)
        offs_m = m + tl.arange(0, BLOCK_M)
        offs_n = n + tl.arange(0, BLOCK_N)
        # Outside the layer an infinite operand would meet a zero and put a NaN where the sum is infinite.
        mask = (offs_m < rows)[:, None] & (offs_n < N)[None, :]
        score = tl.where(mask, tl.abs(w.to(tl.float32) * acc), 0.0)
        sums = partials_ptr + tile_n.to(tl.int64) * width + first_sum + offs_m
        tl.store(sums, tl.sum(score, axis=1), mask=offs_m < rows)


def tiles(rows: Sequence[int], width: int) -> int:
    """Tiles of the gradient of layers with ``rows`` structures' rows each and ``width`` summed elements."""
    return sum(ceil_div(extent, BLOCK_M) for extent in rows) * ceil_div(width, BLOCK_N)


def partial_sums(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    starts: Sequence[int],
    axis: str,
    programs: int,
) -> torch.Tensor:
    """Sums of ``|W * (dY^T X)|`` over the tiles of every row of up to :data:`MAX_LAYERS` layers that read one input.

    Args:
        grad_output: [T, columns].
        input: [T, I].
        weights: of the layers, [O, I] each; no extent is 0.
        starts: first column of each layer in ``grad_output``, the first of them 0.
        axis: ``"row"``, or for one layer ``"column"``.
        programs: at most that many programs run; it shapes no result.

    Returns:
        float32 [tiles, rows of all layers], or [tiles, columns].
    """
    by_row = axis == "row"
    left, right = (grad_output, input) if by_row else (input, grad_output)
    extents = [weight.shape[0 if by_row else 1] for weight in weights]
    width, spare = right.shape[1], MAX_LAYERS - len(weights)
    partials = torch.empty((ceil_div(width, BLOCK_N), sum(extents)), dtype=torch.float32, device=input.device)
    box = [BLOCK_M, BLOCK_N] if by_row else [BLOCK_N, BLOCK_M]
    descriptors = [_descriptor(weight, box) for weight in [*weights, *[weights[-1]] * spare]]
    rows = extents + [0] * spare
    starts = [*starts, *[0] * spare]
    programs = min(programs, tiles(extents, width))
    with torch.cuda.device_of(input):
        _wgrad_tma_kernel[(programs,)](
            m_desc=_descriptor(left, [BLOCK_T, BLOCK_M]),
            n_desc=_descriptor(right, [BLOCK_T, BLOCK_N]),
            w0_desc=descriptors[0],
            w1_desc=descriptors[1],
            w2_desc=descriptors[2],
            partials_ptr=partials,
            T=input.shape[0],
            M0=rows[0],
            M1=rows[1],
            M2=rows[2],
            N=width,
            start1=starts[1],
            start2=starts[2],
            programs=programs,
            BY_ROW=by_row,
            LAYERS=len(weights),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_T=BLOCK_T,
            GROUP_M=GROUP_M,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return partials


def _descriptor(tensor: torch.Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box)
