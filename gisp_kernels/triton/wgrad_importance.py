"""``out[s] += sum |W * (dY^T X)|`` over the rows or columns of structure ``s``; the product is never stored.

Each program forms one [BLOCK_O, BLOCK_I] tile of the weight gradient over all tokens in float32, multiplies it with
its tile of W, and writes the tile's sums per row (or column) to its own place in a workspace. The partials are then
added in a fixed order. Widths and token counts are ordinary arguments: nothing recompiles as a model shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import aligned, pad_columns
from gisp_kernels.forms import ceil_div, run

# Below this many large tiles most multiprocessors of a big GPU would stay idle. It does not depend on the GPU at hand,
# because the choice of tile shapes the rounding.
MIN_LARGE_TILES = 96


@dataclass(frozen=True)
class TileConfig:
    """Tile of the weight gradient per program and how it is scheduled.

    Attributes:
        block_o, block_i: tile of the weight gradient.
        block_t: tokens per iteration.
        group_o: tile rows visited before the next tile column, for reuse in L2.
        num_warps, num_stages: warps per program and depth of the load pipeline.
    """

    block_o: int
    block_i: int
    block_t: int
    group_o: int
    num_warps: int
    num_stages: int


LARGE_16BIT = TileConfig(block_o=128, block_i=256, block_t=64, group_o=8, num_warps=8, num_stages=3)
SMALL_16BIT = TileConfig(block_o=64, block_i=64, block_t=64, group_o=8, num_warps=4, num_stages=4)
FLOAT32 = TileConfig(block_o=64, block_i=64, block_t=16, group_o=8, num_warps=4, num_stages=3)


def choose_config(rows: int, width: int, dtype: torch.dtype) -> TileConfig:
    """Configuration for a weight of ``rows`` by ``width`` and operands of ``dtype``."""
    if dtype == torch.float32:
        return FLOAT32
    tiles = ceil_div(rows, LARGE_16BIT.block_o) * ceil_div(width, LARGE_16BIT.block_i)
    return LARGE_16BIT if tiles >= MIN_LARGE_TILES else SMALL_16BIT


@triton.jit(do_not_specialize=["T", "O", "I", "stride_yt", "stride_xt", "stride_wo"])
def _wgrad_importance_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,  # [T, O]
    x_ptr,  # [T, I]
    w_ptr,  # [O, I]
    partials_ptr,  # float32: [tiles along I, O] by rows, [tiles along O, I] by columns
    T,
    O,  # noqa: E741
    I,  # noqa: E741
    stride_yt,
    stride_yo,
    stride_xt,
    stride_xi,
    stride_wo,
    stride_wi,
    BY_ROW: tl.constexpr,
    PADDED: tl.constexpr,
    ALIGNED_W: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_O: tl.constexpr,
):
    """Tile sums of |W * (dY^T X)|; deterministic, each program owns its slice of the workspace.

    PADDED: rows of dY and X start at multiples of 16 elements and can be read up to the next one past their width.
    """
    readable_o, readable_i = O, I
    if PADDED:
        # Extents are no part of the compiled kernel; this tells it that 16-byte loads are safe.
        readable_o = tl.cdiv(O, 16) * 16
        readable_i = tl.cdiv(I, 16) * 16
        stride_yt = (stride_yt // 16) * 16
        stride_xt = (stride_xt // 16) * 16
    rows, width = O, I
    if ALIGNED_W:
        rows = (O // 16) * 16
        width = (I // 16) * 16
        stride_wo = (stride_wo // 16) * 16
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_i = tl.cdiv(I, BLOCK_I)
    pid = tl.program_id(0)
    per_group = GROUP_O * tiles_i
    first_o = (pid // per_group) * GROUP_O
    group = tl.minimum(tiles_o - first_o, GROUP_O)
    tile_o = first_o + (pid % per_group) % group
    tile_i = (pid % per_group) // group

    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_t = tl.arange(0, BLOCK_T)
    step_y = tl.cast(stride_yt, tl.int64) * BLOCK_T
    step_x = tl.cast(stride_xt, tl.int64) * BLOCK_T
    dy_ptrs = dy_ptr + offs_t.to(tl.int64)[:, None] * stride_yt + offs_o.to(tl.int64)[None, :] * stride_yo
    x_ptrs = x_ptr + offs_t.to(tl.int64)[:, None] * stride_xt + offs_i.to(tl.int64)[None, :] * stride_xi

    acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for start in range(0, T, BLOCK_T):
        mask_t = (offs_t < T - start)[:, None]
        dy = tl.load(dy_ptrs, mask=mask_t & (offs_o < readable_o)[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=mask_t & (offs_i < readable_i)[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
        dy_ptrs += step_y
        x_ptrs += step_x

    mask_o = offs_o < rows
    mask_i = offs_i < width
    mask = mask_o[:, None] & mask_i[None, :]
    w_ptrs = w_ptr + offs_o.to(tl.int64)[:, None] * stride_wo + offs_i.to(tl.int64)[None, :] * stride_wi
    w = tl.load(w_ptrs, mask=mask, other=0.0).to(tl.float32)
    # Outside the matrix an infinite dY would meet a masked 0 and put a NaN where the sum is infinite.
    score = tl.where(mask, tl.abs(w * acc), 0.0)
    if BY_ROW:
        tl.store(partials_ptr + tile_i.to(tl.int64) * O + offs_o, tl.sum(score, axis=1), mask=mask_o)
    else:
        tl.store(partials_ptr + tile_o.to(tl.int64) * I + offs_i, tl.sum(score, axis=0), mask=mask_i)


def partial_sums(
    grad_output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, axis: str, config: TileConfig | None = None
) -> torch.Tensor:
    """Sums of ``|weight * (grad_output.T @ input)|`` over the tiles of every row or column.

    Args:
        grad_output, input, weight, axis: as validated by the op; without an empty extent.
        config: overrides :func:`choose_config`, for benchmarks.

    Returns:
        float32 [tiles, rows] or [tiles, columns].
    """
    rows, width = weight.shape
    config = config or choose_config(rows, width, input.dtype)
    tiles_o, tiles_i = ceil_div(rows, config.block_o), ceil_div(width, config.block_i)
    by_row = axis == "row"
    shape = (tiles_i, rows) if by_row else (tiles_o, width)
    partials = torch.empty(shape, dtype=torch.float32, device=weight.device)
    if input.dtype != torch.float32:
        grad_output, input = pad_columns(grad_output), pad_columns(input)
    padded = aligned(*grad_output.shape[1:], *input.shape[1:], grad_output.stride(0), input.stride(0))
    blocks = config.block_o, config.block_i, config.block_t, config.group_o
    run(
        _wgrad_importance_kernel,
        (tiles_o * tiles_i,),
        (grad_output, input, weight, partials),
        (input.shape[0], rows, width, *grad_output.stride(), *input.stride(), *weight.stride()),
        (by_row, padded, aligned(rows, width, weight.stride(0)), *blocks),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partials
