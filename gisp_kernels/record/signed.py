"""One recorded Linear of a signed score: sums of ``W * G`` that never form the weight gradient ``G``.

With ``Y = X W^T + b`` and ``G = dY^T X`` the sum over row ``r`` is ``sum_t dY[t, r] (Y[t, r] - b[r])`` and over column
``c`` it is ``sum_t X[t, c] dX[t, c]`` with ``dX = dY W``: tensors of the pass itself. Summed in float64, because terms
of both signs cancel.
"""

from __future__ import annotations

import torch

from gisp_kernels.groups import Projection
from gisp_kernels.ops.importance import as_tokens
from gisp_kernels.record.tap import LinearTap, Needs


class SignedTap(LinearTap):
    """Collects signed sums of one Linear layer; the absolute value is the reader's."""

    @property
    def needs(self) -> Needs:
        axes = {projection.axis for projection in self._projections}
        return Needs(input="column" in axes, output="row" in axes, grad_input="column" in axes)

    def reset(self) -> None:
        """Zero the sums, at the present width."""
        weight = self.linear.weight
        self._shape = tuple(weight.shape)
        counts = [p.width // p.block for p in self._projections]
        self._sums = [torch.zeros(n, dtype=torch.float64, device=weight.device) for n in counts]

    def score(self, projection: Projection, active: bool) -> torch.Tensor:
        """Signed sums for one projection, float64 [count]."""
        if active:
            self.check_width()
        return self._sums[self._projections.index(projection)]

    def collect(
        self,
        grad_output: torch.Tensor,
        input: torch.Tensor | None,
        output: torch.Tensor | None,
        grad_input: torch.Tensor | None,
    ) -> None:
        """Take one use of the layer in the running backward pass."""
        self.check_width()
        self._seen()
        for projection, total in zip(self._projections, self._sums, strict=True):
            if projection.axis == "row":
                assert output is not None
                products = output.float()
                if self.linear.bias is not None:
                    products = products - self.linear.bias.detach().float()
                products = products * grad_output
            else:
                assert input is not None and grad_input is not None
                products = input.float() * grad_input
            _add_blocks(total, as_tokens(products).sum(0, dtype=torch.float64))

    def take_weight_grad(self, grad: torch.Tensor) -> None:
        """Hook of the weight: score its gradient, and put its ``.grad`` aside from the accumulation that follows."""
        self.check_width()
        self._seen()
        weight = self.linear.weight
        products = weight.detach().float() * grad
        for projection, total in zip(self._projections, self._sums, strict=True):
            _add_blocks(total, products.sum(1 if projection.axis == "row" else 0, dtype=torch.float64))
        self._kept_grad.append(weight.grad)
        weight.grad = None


def _add_blocks(total: torch.Tensor, lines: torch.Tensor) -> None:
    """Add sums of rows or columns to those of the structures they make up."""
    if len(total):
        total += lines.view(len(total), -1).sum(1)
