"""Objective ``choice``: how likely the right answer is among the answers of its question.

The loss of a question is ``-log(p_right / sum_i p_i)`` with ``p_i`` the likelihood of the tokens of answer ``i``: what
choice accuracy decides by, made smooth. Its gradient is that of ``sum_i c_i * nll_i`` with ``c_right = 1 - q_right``
and ``c_i = -q_i`` for the others, ``q`` being the answers' shares of the likelihood. So one signed backward pass gives
it. ``margin`` (paper Eq. 6) weighs means over tokens by 1 and, where every question has K answers, by
``-1 / (K - 1)``: for answers of one length these weights up to a factor where all K are equally likely. Here a question
that is answered safely no longer counts, and neither does a likelihood that falls for all answers alike.

A question is one decision: its sequences' gradients are added before they are squared for the curvature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from gisp.config.criteria import CRITERIA, names_with
from gisp.config.options import CHOOSING, PruneConfig
from gisp.data import Sequences
from gisp.errors import GispError


def check_objective(data: Sequences, config: PruneConfig) -> Sequences:
    """The data as the objective of a run takes them, once both are checked.

    Raises:
        GispError: questions that have not one right answer each or nothing to decide, a loss or a criterion that
            cannot take them.
    """
    if not data.tasks:
        data = replace(data, compared=config.objective == "choice")
        if config.objective == "margin" and len(set(data.signs)) != 2:
            raise GispError("objective margin needs right and wrong answers, all here are of one kind")
    choosing = next((task for task in data.tasks if task.objective in CHOOSING), None)
    if choosing and not CRITERIA[str(config.criterion)].sees_loss:
        raise GispError(
            f"--criterion {config.criterion} sees no loss: objective {choosing.objective} of {choosing.name} needs one "
            f"of {names_with('sees_loss')}"
        )
    questions = [number for number in range(len(data.examples)) if data.compares(number)]
    if choosing and config.regrow:
        raise GispError(
            f"--regrow takes no task of objective {choosing.objective}, {choosing.name} is one: leave it out"
        )
    if not questions:
        return data
    if "." in config.objective:
        raise GispError(f"a loss of your own ({config.objective}) takes no task of objective choice: give it another")
    decisions = 0
    for number in questions:
        signs = [data.signs[i] for i in data.examples[number]]
        if signs.count(1) != 1:
            raise GispError(
                f"example {number} has {signs.count(1)} right answers of {len(signs)}: objective choice needs one"
            )
        answers = {data.rows[i][0].numpy().tobytes() for i in data.examples[number]}
        decisions += len(answers) > 1
    if not decisions:
        raise GispError("no question has two different answers: objective choice needs a right and a wrong one")
    return data


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
        """Weights of all sequences' mean NLL whose gradient is that of the loss, and what their sum lacks to it.

        Args:
            nll: float64 [R] on the CPU, summed NLL of every sequence of the step; only those of answers are read.
            tokens: scored tokens of every sequence.
            signs, weights: of every sequence; weights of those that are no answers stay as they are.
        """
        if not self.places:
            return list(weights), 0.0
        # Questions side by side, padded with answers that are impossible.
        k = max(len(place) for place in self.places)
        where = torch.tensor([[*place, *[-1] * (k - len(place))] for place in self.places])
        there = where >= 0
        counts = torch.tensor(tokens, dtype=torch.float64)[where]
        total = torch.where(there, nll[where], torch.inf)
        right = torch.tensor(signs)[where].gt(0) & there
        logarithms = (-total).log_softmax(1)
        # 1 - q_right as the sum of the others: it must not vanish in rounding.
        factors = -logarithms.exp().masked_fill(right, 0)
        factors = torch.where(right, -factors.sum(1, keepdim=True), factors)
        share = torch.tensor(self.weights, dtype=torch.float64)
        # An answer that is impossible has no part in the sum, however large its NLL.
        parts = torch.where(factors == 0, 0, factors * total).sum(1)
        losses = -torch.where(right, logarithms, 0).sum(1)
        found = torch.tensor(list(weights), dtype=torch.float64)
        found[where[there]] = (share[:, None] * factors * counts)[there]
        return found.tolist(), float((share * (losses - parts)).sum())

    def samples(self, positions: Sequence[int], curvature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples of the curvature among sequences that hold questions whole, in the order of their positions.

        Args:
            curvature: float32 [B], factors of the sequences, taken for those that are no answers.

        Returns:
            Sample of every sequence, int64 [B], and factors of the samples, float32.
        """
        index: list[int] = []
        factors: list[torch.Tensor] = []
        last = None
        for i, factor in zip(positions, curvature, strict=True):
            number = self.owners.get(i)
            if number is None:
                factors.append(factor)
            elif number != last:
                # The likelihood of one decision.
                factors.append(curvature.new_tensor(1 / self.weights[number]))
            last = number
            index.append(len(factors) - 1)
        return torch.tensor(index, device=curvature.device), torch.stack(factors)

    @cached_property
    def owners(self) -> dict[int, int]:
        """By position the number of the question it belongs to."""
        return {i: number for number, place in enumerate(self.places) for i in place}


def _right(place: range, signs: Sequence[int]) -> int:
    return next(i for i in place if signs[i] > 0)
