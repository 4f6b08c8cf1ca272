"""One recorded weight of scores ``|W * G|``: of every backward pass, or of their summed weight gradient."""

from __future__ import annotations

from typing import Any

import torch

from gisp_kernels.groups import Projection
from gisp_kernels.ops.grouped import ScoredMatrix
from gisp_kernels.ops.importance import as_tokens, wgrad_importance
from gisp_kernels.ops.products import add_product, product_total, weight_grad
from gisp_kernels.record.attach.parallel import is_sharded, whole
from gisp_kernels.record.attach.tap import Tap
from gisp_kernels.record.attach.use import Needs, Use, current_backward, without_autocast
from gisp_kernels.record.sums import add_scores


class ScoredTap(Tap[tuple[torch.Tensor, torch.Tensor]]):
    """Sums ``|W * G| ** power`` over backward passes, or ``G`` itself.

    Args:
        exact: keep the float32 sum of weight gradients and score it on demand.
        power: 1 or 2.
    """

    def __init__(self, *args: Any, exact: bool, power: int) -> None:
        super().__init__(*args)
        self._exact = exact
        self._power = power
        self.additive = exact
        self.degree = 1 if exact else power
        self.score_degree = power

    @property
    def needs(self) -> Needs:
        return Needs(input=True, output=False, grad_input=False)

    def _zero(self) -> None:
        weight = self.weight
        if not self._exact:
            counts = [int(p.count) for p in self._projections]
            self._scores = [torch.zeros(n, dtype=torch.float32, device=weight.device) for n in counts]
        elif weight.dim() == 2:
            rows, width = weight.shape
            self._padded_grad = product_total(rows, width, weight.device)
            self._grad = self._padded_grad[:rows, :width]
        else:
            self._grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    def _totals(self) -> list[torch.Tensor]:
        return [self._grad] if self._exact else self._scores

    def _scores_of(self, projection: Projection, totals: list[torch.Tensor]) -> torch.Tensor:
        if not self._exact:
            return totals[self._projections.index(projection)]
        self.check_width()
        scores = torch.zeros(int(projection.count), dtype=torch.float32, device=totals[0].device)
        add_scores(scores, whole(self.weight.detach()), totals[0], projection, self._power, self._backend)
        return scores

    def matrix(self, projection: Projection, out: torch.Tensor) -> ScoredMatrix | None:
        """What scores a projection together with others of its group, ``out`` [count] being theirs.

        ``None`` where it is scored by itself: without a summed weight gradient, by elements or an index, or where the
        weight has to be gathered from other processes.
        """
        if not self._exact or not _in_blocks(projection) or is_sharded(self.weight):
            return None
        self.check_width()
        return ScoredMatrix(self.weight.detach(), self._grad, out, projection.axis, projection.block)

    def _take_use(self, use: Use) -> None:
        assert use.input is not None and use.grad_output is not None
        grad_output, input = as_tokens(use.grad_output), as_tokens(use.input)
        if self._exact:
            add_product(self._padded_grad, grad_output, input)
        else:
            self._pending.setdefault(current_backward(), []).append((grad_output, input))

    def _end_pass(self, pending: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        # Tokens of all uses side by side give the summed gradient.
        grad_output, input = pending[0] if len(pending) == 1 else map(torch.cat, zip(*pending, strict=True))
        weight = self.weight.detach()
        with without_autocast(weight.device):
            if len(self._projections) == 1 and _in_blocks(self._projections[0]):
                (projection,), (out,) = self._projections, self._scores
                axis, block, power = projection.axis, projection.block, self._power
                wgrad_importance(
                    grad_output, input, weight, axis=axis, block=block, power=power, out=out, backend=self._backend
                )
            else:
                # One product serves all reductions.
                self._take_weight_grad(weight, weight_grad(grad_output, input))

    def _take_weight_grad(self, weight: torch.Tensor, grad: torch.Tensor) -> None:
        if self._exact:
            self._grad.add_(grad)
            return
        for projection, out in zip(self._projections, self._scores, strict=True):
            add_scores(out, weight, grad, projection, self._power, self._backend)


def _in_blocks(projection: Projection) -> bool:
    return projection.index is None and projection.axis != "element"
