"""Scores of several Linear layers that read one input: one product over all their outputs, reduced layer by layer.

Query, key and value projections, or gate and up, share their input. Side by side their weight gradients are one larger
matrix product, which fills a GPU better than two or three small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gisp_kernels import backend as backends
from gisp_kernels.ops import wgrad_native
from gisp_kernels.ops.fusion import multiprocessors, plan
from gisp_kernels.ops.importance import abs_weighted_reduce, wgrad_importance
from gisp_kernels.ops.reference import weight_grad

# Layers one launch of the Triton kernel takes.
MAX_STACK = 3


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

    @property
    def stop(self) -> int:
        return self.start + self.weight.shape[0]


def stacked_wgrad_importance(
    grad_output: torch.Tensor, input: torch.Tensor, parts: Sequence[Part], *, backend: str | None = None
) -> None:
    """Add ``sum |W * (dY.T @ X)|`` over the rows of every structure of every part to its ``out``.

    Args:
        grad_output: [T, columns], the layers' output gradients side by side.
        input: [T, I], what all the layers read, same dtype.
        parts: the layers, by ascending start; columns that no part covers are not scored.
        backend: as in :func:`gisp_kernels.wgrad_importance`.

    Raises:
        TypeError, ValueError: as :func:`gisp_kernels.wgrad_importance`.
    """
    if not parts:
        return
    first = parts[0].start
    columns = grad_output[:, first : parts[-1].stop]
    weights = [part.weight.detach() for part in parts]
    how = "matmul"
    if len(parts) == 1 or backends.requested(backend) == "native":
        how = "apart"
    elif backends.resolve(backend, input, ("triton",)) == "triton":
        how = plan(columns, input, weights, "row") if backends.is_auto(backend) else "apart"
    if how == "native" or (how == "tma" and len(parts) <= MAX_STACK):
        from gisp_kernels.triton import wgrad_tma

        layers = [
            wgrad_tma.Layer(weight, part.start - first, part.block, part.out)
            for weight, part in zip(weights, parts, strict=True)
        ]
        launch = wgrad_native.launch if how == "native" else wgrad_tma.launch
        launch(columns, input, layers, "row", multiprocessors(input.device))
    elif how == "matmul":
        gradient = weight_grad(columns, input)
        for part, weight in zip(parts, weights, strict=True):
            rows = gradient[part.start - first : part.stop - first]
            abs_weighted_reduce(weight, rows, block=part.block, out=part.out, backend=backend)
    else:
        for part, weight in zip(parts, weights, strict=True):
            own = grad_output[:, part.start : part.stop]
            wgrad_importance(own, input, weight, block=part.block, out=part.out, backend=backend)
