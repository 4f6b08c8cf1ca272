"""One recorded weight of a signed score: sums of ``W * G`` that never form the weight gradient ``G``.

With ``Y = X W^T + b`` and ``G = dY^T X`` the sum over row ``r`` is ``sum_t dY[t, r] (Y[t, r] - b[r])`` and over column
``c`` it is ``sum_t X[t, c] dX[t, c]`` with ``dX = dY W``: tensors of the pass itself. Summed in float64, because terms
of both signs cancel.
"""

from __future__ import annotations

import torch

from gisp_kernels.groups import Projection
from gisp_kernels.ops.importance import as_tokens
from gisp_kernels.record.attach.tap import Tap
from gisp_kernels.record.attach.use import Needs, Use
from gisp_kernels.record.sums import add_lines


class SignedTap(Tap[None]):
    """Collects signed sums of one weight, float64; the absolute value is the reader's."""

    @property
    def needs(self) -> Needs:
        return Needs.of_gates(self._projections)

    def _zero(self) -> None:
        counts = [int(p.count) for p in self._projections]
        self._sums = [torch.zeros(n, dtype=torch.float64, device=self.weight.device) for n in counts]

    def _totals(self) -> list[torch.Tensor]:
        return self._sums

    def _scores_of(self, projection: Projection, totals: list[torch.Tensor]) -> torch.Tensor:
        return totals[self._projections.index(projection)]

    def _take_use(self, use: Use) -> None:
        for projection, total in zip(self._projections, self._sums, strict=True):
            value, grad = use.at_gates(projection.axis, self.linear.bias)
            add_lines(total, as_tokens(value.float() * grad).sum(0, dtype=torch.float64), projection)

    def _take_weight_grad(self, weight: torch.Tensor, grad: torch.Tensor) -> None:
        products = weight.float() * grad
        for projection, total in zip(self._projections, self._sums, strict=True):
            lines = products.sum(-1 if projection.axis == "row" else -2, dtype=torch.float64)
            add_lines(total, lines.flatten(), projection)
