"""Sums of ``|W * G| ** power`` over the structures of several weights at once: all matrices of a decoder layer.

What :func:`gisp_kernels.ops.importance.abs_weighted_reduce` does for one matrix. One launch that reads them all has one
last wave instead of one for each, and writes results that need not be zeroed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gisp_kernels import backend as backends
from gisp_kernels import checks


@dataclass(frozen=True, eq=False)
class ScoredMatrix:
    """A weight, its gradient, and the structures that own its rows or columns.

    Attributes:
        weight: [O, I], or [E, O, I] for experts, whose rows and columns are numbered expert by expert; float32,
            bfloat16 or float16, any strides.
        grad: as ``weight``; its dtype may differ.
        out: float32 [count]. Sums of matrices with the same tensor add up.
        axis: ``"row"``: structure ``s`` is rows ``s*block : (s+1)*block``; ``"column"``: those columns.
        block: rows or columns per structure; must divide how many there are.
    """

    weight: torch.Tensor
    grad: torch.Tensor
    out: torch.Tensor
    axis: str = "row"
    block: int = 1


def grouped_abs_weighted_reduce(
    matrices: Sequence[ScoredMatrix], *, power: int = 1, add: bool = True, backend: str | None = None
) -> None:
    """Sum of ``|weight * grad| ** power`` over the structures of every matrix.

    Args:
        matrices: any number; those on one device and of one dtype are read by one launch, eight at a time.
        power: 1 or 2.
        add: add to what every ``out`` holds, else overwrite it.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Raises:
        TypeError: unsupported dtype.
        ValueError: shapes, device, axis, block or power that do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    checks.check_power(power)
    for matrix in matrices:
        _check(matrix)
    kernels = [matrix for matrix in matrices if backends.resolve(backend, matrix.weight) == "triton"]
    if kernels:
        from gisp_kernels.triton import grouped_reduce as kernel

        kernel.launch([(m.weight.detach(), m.grad.detach(), m.out, m.axis, m.block) for m in kernels], power, add)
    plain = [matrix for matrix in matrices if matrix not in kernels]
    if not add:
        for matrix in plain:
            matrix.out.zero_()
    for matrix in plain:
        add_sums(matrix, power)


def add_sums(matrix: ScoredMatrix, power: int) -> None:
    """The reference for one matrix: add its sums to its ``out``."""
    weight, grad = matrix.weight.detach(), matrix.grad.detach()
    lines = []
    # Expert by expert, which bounds the float32 copies.
    for w, g in zip(weight, grad, strict=True) if weight.dim() == 3 else [(weight, grad)]:
        products = w.float() * g.float()
        products = products.abs_() if power == 1 else products.square_()
        lines.append(products.sum(dim=1 if matrix.axis == "row" else 0))
    if lines:
        matrix.out.add_(torch.cat(lines).view(matrix.out.shape[0], matrix.block).sum(dim=1))


def _check(matrix: ScoredMatrix) -> None:
    checks.check_float("weight", matrix.weight)
    checks.check_float("grad", matrix.grad)
    if matrix.weight.dim() not in (2, 3):
        raise ValueError(f"weight must have 2 or 3 dimensions, got shape {tuple(matrix.weight.shape)}")
    checks.check_same_shape("grad", matrix.grad, matrix.weight.shape)
    checks.check_same_device(weight=matrix.weight, grad=matrix.grad)
    checks.score_buffer(matrix.out, checks.structure_count(matrix.weight, matrix.axis, matrix.block), matrix.weight)
