"""Sums over the structures of a projection, whatever way it says which rows, columns or elements they own."""

from __future__ import annotations

import torch

from gisp_kernels.groups import Projection
from gisp_kernels.ops.grouped import ScoredMatrix, grouped_abs_weighted_reduce
from gisp_kernels.ops.importance import abs_weighted_reduce


def add_scores(
    out: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    projection: Projection,
    power: int,
    backend: str | None,
) -> None:
    """Add ``sum |weight * grad| ** power`` of every structure.

    Args:
        out: float32 [count].
        weight, grad: [O, I] or [E, O, I], as :attr:`Projection.weight`.
        projection: which structures.
        power, backend: as of :func:`gisp_kernels.abs_weighted_reduce`.
    """
    axis = projection.axis
    if axis == "element":
        products = weight.float() * grad.float()
        out += (products.abs_() if power == 1 else products.square_()).flatten()
    elif projection.index is None and weight.dim() == 2:
        abs_weighted_reduce(weight, grad, axis=axis, block=projection.block, power=power, out=out, backend=backend)
    elif projection.index is None:
        matrix = ScoredMatrix(weight, grad, out, axis, projection.block)
        grouped_abs_weighted_reduce([matrix], power=power, backend=backend)
    else:
        lines = torch.empty(projection.width, dtype=torch.float32, device=out.device)
        matrix = ScoredMatrix(weight, grad, lines, axis)
        grouped_abs_weighted_reduce([matrix], power=power, add=False, backend=backend)
        add_lines(out, lines, projection)


def add_lines(out: torch.Tensor, lines: torch.Tensor, projection: Projection) -> None:
    """Add sums of rows or columns, [width], to those of the structures that own them, [count]."""
    if projection.index is not None:
        out += lines[projection.index.to(lines.device)].sum(1)
    elif len(out):
        out += lines.view(len(out), -1).sum(1)


def own_lines(tensor: torch.Tensor, projection: Projection) -> tuple[torch.Tensor, int]:
    """The last dimension of [..., width] as structures lie one after another, and how many entries each has."""
    if projection.index is None:
        return tensor, projection.block
    return tensor.index_select(-1, projection.index.to(tensor.device).flatten()), projection.index.shape[1]
