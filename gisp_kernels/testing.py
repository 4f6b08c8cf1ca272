"""Judging kernels: the error they add, and whether they choose the same structures.

A kernel is compared with the float64 truth. It may err as much as the plain torch version in the working dtype does,
plus a small step that follows from float32 rounding and the number of terms; there is no tolerance to widen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gisp_kernels.ops.products import add_product, product_total

EPS_FLOAT32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Truth:
    """Float64 scores of a case.

    Attributes:
        scores: [count].
        magnitude: [count], the same sums with every product made positive: the scale of rounding errors.
        terms: length of the longest chain of additions behind one score.
    """

    scores: torch.Tensor
    magnitude: torch.Tensor
    terms: int

    @property
    def step(self) -> float:
        """Error relative to ``magnitude`` granted on top of the reference: sqrt(terms) float32 roundings, twice."""
        return 2 * EPS_FLOAT32 * (1 + self.terms**0.5)


def reduce_truth(weight: torch.Tensor, grad: torch.Tensor, axis: str, block: int, power: int = 1) -> Truth:
    """Truth of ``sum |weight * grad| ** power`` of matrices [O, I], by structure."""
    scores = _reduce64((weight.double() * grad.double()) ** power, axis, block)
    return Truth(scores, scores, _terms(weight, axis, block))


def wgrad_truth(grad_output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, axis: str, block: int) -> Truth:
    """Truth of ``sum |weight * (grad_output.T @ input)|`` of [..., O], [..., I] and [O, I], by structure."""
    dy, x, w = grad_output.double().flatten(0, -2), input.double().flatten(0, -2), weight.double()
    scores = _reduce64(w * (dy.T @ x), axis, block)
    magnitude = _reduce64(w * (dy.abs().T @ x.abs()), axis, block)
    return Truth(scores, magnitude, _terms(weight, axis, block) + x.shape[0])


def gate_truth(input: torch.Tensor, grad_input: torch.Tensor, block: int) -> Truth:
    """Truth of ``sum input * grad_input`` over tokens and ``block`` columns, [B * count]."""
    product = input.double() * grad_input.double()
    sums = [t.sum(1).view(len(t), -1, block).sum(2).flatten() for t in (product, product.abs())]
    return Truth(sums[0], sums[1], input.shape[1] * block)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left.T @ right`` of [T, M] and [T, N] by :func:`gisp_kernels.ops.products.add_product`, float32 [M, N]."""
    total = product_total(left.shape[1], right.shape[1], left.device)
    add_product(total, left, right)
    return total[: left.shape[1], : right.shape[1]]


def assert_error_budget(actual: torch.Tensor, reference: torch.Tensor, truth: Truth) -> None:
    """Fail unless ``actual`` errs at most as much as ``reference`` plus :attr:`Truth.step`.

    Args:
        actual: scores of the kernel, float32 [count].
        reference: scores of the plain torch version in the working dtype, float32 [count].
        truth: float64 scores.
    """
    assert actual.dtype == torch.float32, f"scores must be float32, got {actual.dtype}"
    assert actual.shape == truth.scores.shape, f"{tuple(actual.shape)} is not {tuple(truth.scores.shape)}"
    if actual.numel() == 0:
        return
    worst, where = _relative_error(actual, truth)
    allowed = _relative_error(reference, truth)[0] + truth.step
    assert worst <= allowed, (
        f"score {where} is {actual[where].item()!r}, truth {truth.scores[where].item()!r}: relative error "
        f"{worst:.3g}, allowed {allowed:.3g}"
    )


def _relative_error(scores: torch.Tensor, truth: Truth) -> tuple[float, int]:
    error = (scores.double() - truth.scores).abs()
    relative = torch.where(error == 0, error, error / truth.magnitude)
    assert not relative.isnan().any(), f"scores are not finite: {scores}"
    where = int(relative.argmax())
    return float(relative[where]), where


def _reduce64(product: torch.Tensor, axis: str, block: int) -> torch.Tensor:
    lines = product.abs().sum(dim=1 if axis == "row" else 0)
    return lines.view(lines.numel() // block, block).sum(dim=1)


def _terms(weight: torch.Tensor, axis: str, block: int) -> int:
    return weight.shape[1 if axis == "row" else 0] * block
