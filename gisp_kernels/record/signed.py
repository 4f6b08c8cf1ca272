"""One recorded Linear of a signed score: sums of ``W * G`` that never form the weight gradient ``G``.

With ``Y = X W^T + b`` and ``G = dY^T X`` the sum over row ``r`` is ``sum_t dY[t, r] (Y[t, r] - b[r])`` and over column
``c`` it is ``sum_t X[t, c] dX[t, c]`` with ``dX = dY W``: tensors of the pass itself. Summed in float64, because terms
of both signs cancel.
"""

from __future__ import annotations

import torch

from gisp_kernels.groups import Projection
from gisp_kernels.ops.importance import as_tokens
from gisp_kernels.record.tap import Needs, Tap, Use


class SignedTap(Tap[None]):
    """Collects signed sums of one Linear layer, float64; the absolute value is the reader's."""

    @property
    def needs(self) -> Needs:
        return Needs.of_gates(self._projections)

    def _zero(self) -> None:
        counts = [p.width // p.block for p in self._projections]
        self._sums = [torch.zeros(n, dtype=torch.float64, device=self.linear.weight.device) for n in counts]

    def _scores_of(self, projection: Projection) -> torch.Tensor:
        return self._sums[self._projections.index(projection)]

    def _take_use(self, use: Use) -> None:
        for projection, total in zip(self._projections, self._sums, strict=True):
            value, grad = use.at_gates(projection.axis, self.linear.bias)
            _add_blocks(total, as_tokens(value.float() * grad).sum(0, dtype=torch.float64))

    def _take_weight_grad(self, grad: torch.Tensor) -> None:
        products = self.linear.weight.detach().float() * grad
        for projection, total in zip(self._projections, self._sums, strict=True):
            _add_blocks(total, products.sum(1 if projection.axis == "row" else 0, dtype=torch.float64))


def _add_blocks(total: torch.Tensor, lines: torch.Tensor) -> None:
    """Add sums of rows or columns to those of the structures they make up."""
    if len(total):
        total += lines.view(len(total), -1).sum(1)
