"""Objective ``choice``: how likely the right answer is among the answers of its question.

The loss of a question is ``-log(p_right / sum_i p_i)`` with ``p_i`` the likelihood of the tokens of answer ``i``: what
choice accuracy decides by, made smooth. Its gradient is that of ``sum_i c_i * nll_i`` with ``c_right = 1 - q_right``
and ``c_i = -q_i`` for the others, ``q`` being the answers' shares of the likelihood. So one signed backward pass gives
it, as for ``margin`` (paper Eq. 6), whose weights are these where all answers are equally likely; here a question that
is answered safely no longer counts, and a likelihood that falls everywhere alike gains nothing.

A question is one decision: its sequences' gradients are added before they are squared for the curvature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Units:
    """What of a batch is squared as one.

    Attributes:
        index: int64 [B], unit of every sequence.
        curvature: float32 [U], factors as of :func:`gisp_kernels.gate_sums`.
    """

    index: torch.Tensor
    curvature: torch.Tensor


@dataclass(frozen=True)
class Questions:
    """The questions among the sequences of a step.

    Attributes:
        places: positions of each question's answers in the step, consecutive ones.
        weights: weight of each question in the loss.
    """

    places: tuple[range, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, places: Sequence[range], signs: Sequence[int], weights: Sequence[float]) -> Questions:
        """From signs and weights of all sequences of the step: a question weighs what its right answer does."""
        return cls(tuple(places), tuple(weights[_right(place, signs)] for place in places))

    def compare(
        self, nll: torch.Tensor, tokens: Sequence[int], signs: Sequence[int], weights: Sequence[float]
    ) -> tuple[list[float], float]:
        """Weights of all sequences' mean NLL whose gradient is that of the loss, and what makes the sum the loss.

        Args:
            nll: float64 [R] on the CPU, mean NLL of every sequence of the step; only those of answers are read.
            tokens: scored tokens of every sequence.
            signs, weights: of every sequence; weights of those that are no answers stay as they are.
        """
        found, correction = list(weights), 0.0
        for place, weight in zip(self.places, self.weights, strict=True):
            counts = torch.tensor([tokens[i] for i in place], dtype=torch.float64)
            total = nll[place.start : place.stop] * counts
            right = _right(place, signs) - place.start
            logarithms = (-total).log_softmax(0)
            factors = -logarithms.exp()
            # 1 - q_right as the sum of the others: it must not vanish in rounding.
            factors[right] = 0
            factors[right] = -factors.sum()
            for i, factor in zip(place, (weight * factors * counts).tolist(), strict=True):
                found[i] = factor
            correction += weight * float(-logarithms[right] - (factors * total).sum())
        return found, correction

    def units(self, positions: Sequence[int], curvature: torch.Tensor) -> Units:
        """Units of a batch of sequences that holds questions whole, in the order of their positions.

        Args:
            curvature: float32 [B], factors of the sequences, taken for those that are no answers.
        """
        owner = {i: number for number, place in enumerate(self.places) for i in place}
        index: list[int] = []
        factors: list[torch.Tensor] = []
        last = None
        for i, factor in zip(positions, curvature, strict=True):
            number = owner.get(i)
            if number is None:
                factors.append(factor)
            elif number != last:
                # The likelihood of one decision.
                factors.append(curvature.new_tensor(1 / self.weights[number]))
            last = number
            index.append(len(factors) - 1)
        return Units(torch.tensor(index, device=curvature.device), torch.stack(factors))


def _right(place: range, signs: Sequence[int]) -> int:
    return next(i for i in place if signs[i] > 0)
