"""Operands of the fused kernels for large weights, with poison around them, run on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from selection_oracle import assert_same_selection

from gisp_kernels.testing import assert_error_budget, wgrad_truth
from gisp_kernels.triton import wgrad_tma
from gisp_kernels.triton.abs_weighted_reduce import finish

# Tile sums of a fused kernel, with the interface of the TMA kernel's.
PartialSums = Callable[..., torch.Tensor]
# Rows, columns, tokens: whole tiles; ragged on all axes; less than a tile; one token; several tiles each way.
SHAPES = ((256, 512, 64), (136, 264, 70), (8, 16, 3), (40, 24, 1), (392, 776, 129))


def inside(rows: int, width: int, dtype: torch.dtype, device: str, poison: float = float("nan")) -> torch.Tensor:
    """Random [rows, width] as a prefix of rows and columns of a matrix that is ``poison`` elsewhere."""
    whole = torch.full((rows + 24, width + 24), poison, dtype=dtype, device=device)
    whole[:rows, :width] = torch.randn(rows, width, device=device).to(dtype)
    return whole[:rows, :width]


def score(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    axis: str,
    block: int = 1,
    partial_sums: PartialSums = wgrad_tma.partial_sums,
) -> torch.Tensor:
    count = weight.shape[0 if axis == "row" else 1] // block
    out = torch.zeros(count, device=dy.device)
    finish(out, partial_sums(dy, x, [weight], [0], axis, 5), block)
    return out


def add_scores(
    outs: Sequence[torch.Tensor],
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    starts: Sequence[int],
    block: int,
    partial_sums: PartialSums,
) -> None:
    """Scores by rows of several layers in one launch."""
    partials = partial_sums(dy, x, weights, starts, "row", 7)
    for out, own in zip(outs, partials.split([len(weight) for weight in weights], dim=1), strict=True):
        finish(out, own, block)


def check_one_layer(
    shape: tuple[int, int, int],
    axis: str,
    block: int,
    dtype: torch.dtype,
    device: str,
    partial_sums: PartialSums = wgrad_tma.partial_sums,
) -> None:
    rows, width, tokens = shape
    dy, x = inside(tokens, rows, dtype, device), inside(tokens, width, dtype, device)
    weight = inside(rows, width, dtype, device)
    truth = wgrad_truth(dy, x, weight, axis, block)
    scores = score(dy, x, weight, axis, block, partial_sums)
    assert_error_budget(scores, truth.scores.float(), truth)
    if scores.numel() > 3:
        assert_same_selection(scores, truth, scores.numel() // 2)


def check_layers_side_by_side(
    dtype: torch.dtype, device: str, partial_sums: PartialSums = wgrad_tma.partial_sums
) -> None:
    """Every layer of a stack scores what it scores alone, bit for bit, whatever lies in the columns between."""
    tokens, width, extents, gap = 70, 264, (136, 8, 264), 8
    columns = sum(extents) + 2 * gap
    dy, x = inside(tokens, columns, dtype, device), inside(tokens, width, dtype, device)
    starts = (0, extents[0] + gap, extents[0] + extents[1] + 2 * gap)
    weights = [inside(rows, width, dtype, device) for rows in extents]
    for count in (2, 3):
        outs = [torch.zeros(rows // 8, device=device) for rows in extents[:count]]
        add_scores(outs, dy, x, weights[:count], starts[:count], 8, partial_sums)
        for out, weight, start in zip(outs, weights, starts, strict=False):
            alone = score(dy[:, start : start + len(weight)], x, weight, "row", 8, partial_sums)
            assert torch.equal(out, alone)


def check_infinities_stay_where_they_are(
    dtype: torch.dtype, device: str, partial_sums: PartialSums = wgrad_tma.partial_sums
) -> None:
    """An infinite input column makes every row infinite, and no NaN where the matrix has ended."""
    dy, x, weight = (inside(*size, dtype, device) for size in ((64, 136), (64, 264), (136, 264)))
    x[:, 7] = float("inf")
    weight[5, 7] = 0.0
    dy[:, 5] = 1.0
    scores = score(dy, x, weight, "row", partial_sums=partial_sums)
    assert scores[5].isnan()
    by_column = score(dy, x, weight, "column", partial_sums=partial_sums)
    assert by_column[:7].isfinite().all() and by_column[8:].isfinite().all()
    assert not by_column[7].isfinite()
