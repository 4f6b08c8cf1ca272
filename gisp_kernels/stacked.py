"""Scores of several Linear layers that read one input: one product over all their outputs, reduced layer by layer.

Query, key and value projections, or gate and up, share their input. Side by side their weight gradients are one larger
matrix product, which fills a GPU better than two or three small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gisp_kernels.importance import abs_weighted_reduce, prefer_fused, wgrad_importance
from gisp_kernels.reference import weight_grad


@dataclass(frozen=True)
class Part:
    """One layer's share of a stacked output.

    Attributes:
        start: first column of the stacked gradient that belongs to the layer.
        weight: [O, I], the layer's weight; it owns columns ``start : start + O``.
        block: rows per structure.
        out: float32 [O / block] the scores are added to.
    """

    start: int
    weight: torch.Tensor
    block: int
    out: torch.Tensor


def stacked_wgrad_importance(grad_output: torch.Tensor, input: torch.Tensor, parts: Sequence[Part]) -> None:
    """Add ``sum |W * (dY.T @ X)|`` over the rows of every structure of every part to its ``out``.

    Args:
        grad_output: [T, columns], the layers' output gradients side by side.
        input: [T, I], what all the layers read, same dtype.
        parts: the layers, by ascending start; columns that no part covers are not scored.

    Raises:
        TypeError, ValueError: as :func:`gisp_kernels.wgrad_importance`.
    """
    if not parts:
        return
    if len(parts) == 1 or prefer_fused(input.shape[0], input.dtype):
        for part in parts:
            columns = grad_output[:, part.start : part.start + part.weight.shape[0]]
            wgrad_importance(columns, input, part.weight, block=part.block, out=part.out)
        return
    first, last = parts[0].start, parts[-1].start + parts[-1].weight.shape[0]
    gradient = weight_grad(grad_output[:, first:last], input)
    for part in parts:
        rows = gradient[part.start - first : part.start - first + part.weight.shape[0]]
        abs_weighted_reduce(part.weight, rows, block=part.block, out=part.out)
