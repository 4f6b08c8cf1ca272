"""One recorded Linear of scores ``|W * G|``: of every backward pass, or of their summed weight gradient."""

from __future__ import annotations

from typing import Any

import torch

from gisp_kernels.groups import Projection
from gisp_kernels.ops.importance import abs_weighted_reduce, as_tokens, wgrad_importance
from gisp_kernels.ops.products import add_product, product_total
from gisp_kernels.record.tap import Needs, Tap, Use, current_backward


class ScoredTap(Tap[tuple[torch.Tensor, torch.Tensor]]):
    """Sums ``|W * G|`` over backward passes, or ``G`` itself.

    Args:
        exact: keep the float32 sum of weight gradients and score it on demand.
    """

    def __init__(self, *args: Any, exact: bool) -> None:
        super().__init__(*args)
        self._exact = exact

    @property
    def needs(self) -> Needs:
        return Needs(input=True, output=False, grad_input=False)

    def _zero(self) -> None:
        rows, width = self._shape
        device = self.linear.weight.device
        if self._exact:
            self._padded_grad = product_total(rows, width, device)
            self._grad = self._padded_grad[:rows, :width]
        else:
            counts = [p.width // p.block for p in self._projections]
            self._scores = [torch.zeros(n, dtype=torch.float32, device=device) for n in counts]

    def _scores_of(self, projection: Projection) -> torch.Tensor:
        if not self._exact:
            return self._scores[self._projections.index(projection)]
        self.check_width()
        axis, block = projection.axis, projection.block
        return abs_weighted_reduce(self.linear.weight, self._grad, axis=axis, block=block, backend=self._backend)

    def _take_use(self, use: Use) -> None:
        assert use.input is not None
        grad_output, input = as_tokens(use.grad_output), as_tokens(use.input)
        if self._exact:
            add_product(self._padded_grad, grad_output, input)
        else:
            self._pending.setdefault(current_backward(), []).append((grad_output, input))

    def _end_pass(self, pending: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        # Tokens of all uses side by side give the summed gradient.
        grad_output, input = pending[0] if len(pending) == 1 else map(torch.cat, zip(*pending, strict=True))
        weight = self.linear.weight
        with torch.autocast(weight.device.type, enabled=False):
            for projection, out in zip(self._projections, self._scores, strict=True):
                axis, block = projection.axis, projection.block
                wgrad_importance(grad_output, input, weight, axis=axis, block=block, out=out, backend=self._backend)

    def _take_weight_grad(self, grad: torch.Tensor) -> None:
        if self._exact:
            self._grad.add_(grad)
            return
        for projection, out in zip(self._projections, self._scores, strict=True):
            axis, block = projection.axis, projection.block
            abs_weighted_reduce(self.linear.weight, grad, axis=axis, block=block, out=out, backend=self._backend)
