"""Corrections of one output projection, from running sums over calibration tokens.

A block's output projection computes ``P = X W^T`` from the inputs ``X`` [T, K] of the structures it keeps. ``R`` [T, D]
is what its output lacks to the target. Each fit changes ``W`` by ``dW`` and the bias by ``db`` so that
``X dW^T + db`` comes near ``R``:

- ``bias`` (FLAP, arXiv 2312.11983, section 3.3): ``dW = 0, db = mean(R)``.
- ``affine`` (SlimLLM, arXiv 2505.22689): ``dW = diag(a) W`` with ``a_i = cov(R_i, P_i) / var(P_i)`` and
  ``db = mean(R) - a mean(P)``: the least squares line of every output dimension.
- ``rescale``: ``dW = a W`` with one number ``a = <R, P> / <P, P>``, summed over tokens and dimensions. HARP (arXiv
  2507.01900) scales the branch of attention layers without queries and keys and searches the number layer by layer, by
  perplexity; this is the least squares solution, for any block.
- ``lsq`` (OSSCAR, arXiv 2403.12983; Tyr-the-Pruner, arXiv 2503.09657): ``dW = C (H + lambda I)^-1`` with
  ``H = cov(X, X), C = cov(R, X)``, ``db = mean(R) - dW mean(X)``: ridge regression towards the weights that are there.

Without an intercept, which ``rescale`` never has, second moments take the place of covariances and ``db`` stays zero.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from gisp_kernels.ops.products import add_exact_product

Self = TypeVar("Self", bound="BiasFit")

# How far damping is raised, tenfold each time, until the Cholesky factorisation exists.
_RAISED = 8
_FIRST_DAMPING = 1e-8


@dataclass(frozen=True)
class Solution:
    """A correction in float64.

    Attributes:
        weight: ``dW``, float64 [D, K], or None for none.
        bias: ``db``, float64 [D], or None for none.
        before, after: sum of squares of ``R`` over the calibration tokens, and of what is left of it (before rounding
            to the dtype of the model).
        damping: what ``lsq`` needed, relative to the mean diagonal; 0 for other methods.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    before: float
    after: float
    damping: float = 0.0


class BiasFit:
    """FLAP's bias; memory 2 D doubles.

    Attributes:
        SUMS: names of the tensors that tokens are summed in.
    """

    SUMS: tuple[str, ...] = ("count", "residual", "energy")

    def __init__(self, weight: torch.Tensor, *, intercept: bool = True, damping: float = 0.0) -> None:
        """
        Args:
            weight: kept columns of the projection, float32 [D, K].
            intercept: whether ``affine`` and ``lsq`` fit a bias too.
            damping: of ``lsq``, relative to the mean diagonal.
        """
        self.weight, self.intercept, self.damping = weight, intercept, damping
        self.count = _zeros(weight)
        self.residual = _zeros(weight, weight.shape[0])
        self.energy = _zeros(weight, weight.shape[0])

    @property
    def tokens(self) -> int:
        """Number of tokens taken in."""
        return int(self.count)

    @property
    def sums(self) -> list[torch.Tensor]:
        """What tokens are summed in, float64."""
        return [getattr(self, name) for name in self.SUMS]

    def holding(self: Self, sums: Sequence[torch.Tensor]) -> Self:
        """The same fit over other sums, which it adds to in place."""
        other = copy.copy(self)
        for name, tensor in zip(self.SUMS, sums, strict=True):
            setattr(other, name, tensor)
        return other

    def add(self, inputs: torch.Tensor, residual: torch.Tensor) -> None:
        """Take in tokens: inputs [T, K] in any dtype, residual float32 [T, D]."""
        wide = residual.double()
        self.count += len(wide)
        self.residual += wide.sum(0)
        self.energy += wide.square().sum(0)

    def solve(self) -> Solution:
        """The correction for all tokens taken in."""
        mean = self.residual / self.tokens
        after = (self.energy - self.tokens * mean.square()).clamp_min(0)
        return Solution(None, mean, float(self.energy.sum()), float(after.sum()))


class AffineFit(BiasFit):
    """SlimLLM's line per output dimension; memory 5 D doubles."""

    SUMS = (*BiasFit.SUMS, "output", "square", "cross")

    def __init__(self, weight: torch.Tensor, *, intercept: bool = True, damping: float = 0.0) -> None:
        super().__init__(weight, intercept=intercept, damping=damping)
        self.output, self.square, self.cross = (_zeros(weight, weight.shape[0]) for _ in range(3))

    def add(self, inputs: torch.Tensor, residual: torch.Tensor) -> None:
        """As :meth:`BiasFit.add`."""
        super().add(inputs, residual)
        output = (inputs.float() @ self.weight.T).double()
        self.output += output.sum(0)
        self.square += output.square().sum(0)
        self.cross += (output * residual.double()).sum(0)

    def solve(self) -> Solution:
        """As :meth:`BiasFit.solve`."""
        mean = self.output / self.tokens if self.intercept else torch.zeros_like(self.output)
        level = self.residual / self.tokens if self.intercept else mean
        variance = self.square - self.tokens * mean.square()
        covariance = self.cross - self.tokens * mean * level
        # A dimension whose output hardly varies has no slope of its own: sums leave only rounding there.
        varies = variance > torch.finfo(torch.float32).eps * self.square
        slope = torch.where(varies, covariance / torch.where(varies, variance, 1), 0)
        after = self.energy - self.tokens * level.square() - slope * covariance
        return Solution(
            weight=slope[:, None] * self.weight.double(),
            bias=level - slope * mean if self.intercept else None,
            before=float(self.energy.sum()),
            after=float(after.clamp_min(0).sum()),
        )


class RescaleFit(BiasFit):
    """HARP's scalar in closed form; memory 2 doubles beside the bias fit's 2 D."""

    SUMS = (*BiasFit.SUMS, "square", "cross")

    def __init__(self, weight: torch.Tensor, *, intercept: bool = True, damping: float = 0.0) -> None:
        super().__init__(weight, intercept=intercept, damping=damping)
        self.square, self.cross = _zeros(weight), _zeros(weight)

    def add(self, inputs: torch.Tensor, residual: torch.Tensor) -> None:
        """As :meth:`BiasFit.add`."""
        super().add(inputs, residual)
        output = (inputs.float() @ self.weight.T).double()
        self.square += output.square().sum()
        self.cross += (output * residual.double()).sum()

    def solve(self) -> Solution:
        """As :meth:`BiasFit.solve`."""
        # Only an output of zeros has no scale; sums that are not finite go on into the weights, which are checked.
        scale = torch.zeros_like(self.cross) if float(self.square) == 0 else self.cross / self.square
        before = float(self.energy.sum())
        after = before - float(scale * self.cross)
        return Solution(scale * self.weight.double(), None, before, max(after, 0.0))


class LeastSquaresFit(BiasFit):
    """All kept columns by ridge regression; memory 2 K*K + 2 D*K doubles while solving."""

    SUMS = (*BiasFit.SUMS, "input", "gram", "cross")

    def __init__(self, weight: torch.Tensor, *, intercept: bool = True, damping: float = 0.0) -> None:
        super().__init__(weight, intercept=intercept, damping=damping)
        rows, columns = weight.shape
        self.input = _zeros(weight, columns)
        self.gram = _zeros(weight, columns, columns)
        self.cross = _zeros(weight, rows, columns)

    def add(self, inputs: torch.Tensor, residual: torch.Tensor) -> None:
        """As :meth:`BiasFit.add`."""
        super().add(inputs, residual)
        self.input += inputs.double().sum(0)
        add_exact_product(self.gram, inputs, inputs)
        add_exact_product(self.cross, residual, inputs)

    def solve(self) -> Solution:
        """As :meth:`BiasFit.solve`; the sums are used up."""
        mean = self.input / self.tokens if self.intercept else torch.zeros_like(self.input)
        level = self.residual / self.tokens if self.intercept else torch.zeros_like(self.residual)
        self.gram.addr_(mean, mean, alpha=-self.tokens)
        self.cross.addr_(level, mean, alpha=-self.tokens)
        change, damping = ridge(self.gram, self.cross, self.damping)
        explained = 2 * (change * self.cross).sum() - ((change @ self.gram) * change).sum()
        before = float(self.energy.sum())
        after = before - float(self.tokens * level.square().sum() + explained)
        bias = level - change @ mean if self.intercept else None
        return Solution(change, bias, before, max(after, 0.0), damping)


def ridge(gram: torch.Tensor, cross: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """``cross (gram + lambda I)^-1`` with ``lambda = damping * mean(diagonal of gram)``, and the damping it took.

    Where rounding leaves the matrix not positive definite, damping is raised tenfold until it is.

    Args:
        gram: float64 [K, K], symmetric; its diagonal is raised for the factorisation and put back.
        cross: float64 [D, K].

    Raises:
        ArithmeticError: no damping helps, as the sums are not finite.
    """
    diagonal = gram.diagonal()
    scale = float(diagonal.mean()) if len(diagonal) else 0.0
    if scale <= 0:
        return torch.zeros_like(cross), damping
    kept = diagonal.clone()
    for _ in range(_RAISED):
        diagonal.copy_(kept + damping * scale)
        factor, info = torch.linalg.cholesky_ex(gram)
        diagonal.copy_(kept)
        if int(info) == 0:
            return torch.cholesky_solve(cross.T, factor).T, damping
        damping = max(10 * damping, _FIRST_DAMPING)
    # The inputs are not finite then, or the sums are.
    raise ArithmeticError(f"no Cholesky factorisation with damping up to {damping / 10:g}")


# By the names of :data:`gisp.compensation.options.METHODS`.
FITS = {"bias": BiasFit, "affine": AffineFit, "rescale": RescaleFit, "lsq": LeastSquaresFit}


def _zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)
