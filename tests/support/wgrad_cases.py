"""Operands of the fused kernels for large weights, with poison around them, run on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gisp_kernels.testing import assert_error_budget, assert_same_selection, wgrad_truth
from gisp_kernels.triton import wgrad_tma
from gisp_kernels.triton.wgrad_tma import Layer

# A launcher with the interface of the TMA kernel's.
Launch = Callable[..., None]
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
    launch: Launch = wgrad_tma.launch,
) -> torch.Tensor:
    count = weight.shape[0 if axis == "row" else 1] // block
    out = torch.zeros(count, device=dy.device)
    launch(dy, x, [Layer(weight, 0, block, out)], axis, 5)
    return out


def check_one_layer(
    shape: tuple[int, int, int],
    axis: str,
    block: int,
    dtype: torch.dtype,
    device: str,
    launch: Launch = wgrad_tma.launch,
) -> None:
    rows, width, tokens = shape
    dy, x = inside(tokens, rows, dtype, device), inside(tokens, width, dtype, device)
    weight = inside(rows, width, dtype, device)
    truth = wgrad_truth(dy, x, weight, axis, block)
    scores = score(dy, x, weight, axis, block, launch)
    assert_error_budget(scores, truth.scores.float(), truth)
    if scores.numel() > 3:
        assert_same_selection(scores, truth, scores.numel() // 2)


def check_layers_side_by_side(dtype: torch.dtype, device: str, launch: Launch = wgrad_tma.launch) -> None:
    """Every layer of a stack scores what it scores alone, bit for bit, whatever lies in the columns between."""
    tokens, width, extents, gap = 70, 264, (136, 8, 264), 8
    columns = sum(extents) + 2 * gap
    dy, x = inside(tokens, columns, dtype, device), inside(tokens, width, dtype, device)
    starts = (0, extents[0] + gap, extents[0] + extents[1] + 2 * gap)
    weights = [inside(rows, width, dtype, device) for rows in extents]
    for count in (2, 3):
        outs = [torch.zeros(rows // 8, device=device) for rows in extents[:count]]
        layers = [Layer(w, s, 8, o) for w, s, o in zip(weights, starts, outs, strict=False)]
        launch(dy, x, layers, "row", 7)
        for layer, rows in zip(layers, extents, strict=False):
            alone = score(dy[:, layer.start : layer.start + rows], x, layer.weight, "row", 8, launch)
            assert torch.equal(layer.out, alone)


def check_infinities_stay_where_they_are(dtype: torch.dtype, device: str, launch: Launch = wgrad_tma.launch) -> None:
    """An infinite input column makes every row infinite, and no NaN where the matrix has ended."""
    dy, x, weight = (inside(*size, dtype, device) for size in ((64, 136), (64, 264), (136, 264)))
    x[:, 7] = float("inf")
    weight[5, 7] = 0.0
    dy[:, 5] = 1.0
    scores = score(dy, x, weight, "row", launch=launch)
    assert scores[5].isnan()
    by_column = score(dy, x, weight, "column", launch=launch)
    assert by_column[:7].isfinite().all() and by_column[8:].isfinite().all()
    assert not by_column[7].isfinite()
