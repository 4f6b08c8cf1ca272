"""The sequences of one step: their weights, the questions among them, and which pass through the model together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from gisp.data import Sequences
from gisp.data.batches import StepBatches
from gisp.score.fused import FurtherAnswers, Units
from gisp.score.objectives import sequence_curvature
from gisp.score.questions import Questions


@dataclass(frozen=True)
class Portion:
    """Sequences that pass through the model together.

    Attributes:
        ids, labels: int64 [B, S], see :meth:`gisp.data.Sequences.batch`.
        weights: of their mean NLL in the loss [B].
        further: answers that share their passes [M], with weights of their own.
        positions: in the step, of the sequences and then of the further answers [B + M].
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: list[float]
    further: FurtherAnswers | None
    positions: list[int]


@dataclass(frozen=True)
class StepRows:
    """The sequences of a step.

    Attributes:
        numbers: of the sequences, the positions of the step.
        weights: weight of each sequence's mean NLL in the loss.
        questions: those of the positions whose answers are compared.
        leaders: of every position the one whose pass through the model it may share.
        batches: stretches of positions that pass through the model together.
        correction: what the weighted sum of NLL lacks to the loss.
    """

    numbers: list[int]
    weights: list[float]
    questions: Questions
    leaders: list[int]
    batches: list[tuple[int, int]]
    correction: float = 0.0

    @classmethod
    def of(cls, data: Sequences, steps: StepBatches, step: int) -> StepRows:
        """The rows of a step (1-based)."""
        numbers, weights, places = steps.numbers(step), steps.weights(step), steps.questions(step)
        questions = Questions.of(places, [data.signs[i] for i in numbers], weights)
        return cls(numbers, weights, questions, steps.leaders(step), list(steps.batches(numbers, places)))

    @property
    def units(self) -> int:
        """Independent parts of the loss: questions and sequences that are no answers."""
        return len(self.numbers) - sum(len(place) - 1 for place in self.questions.places)

    @property
    def opposed(self) -> bool:
        """Whether sequences that are no answers of questions pull the other way."""
        return any(weight < 0 for i, weight in enumerate(self.weights) if i not in self.questions.owners)

    def led(self, start: int, stop: int) -> list[int]:
        """The positions whose sequences pass through the model, of those from ``start`` to ``stop``."""
        return [i for i in range(start, stop) if self.leaders[i] == i]

    def portion(self, led: list[int], data: Sequences) -> Portion:
        """Sequences at leading positions, with the answers that share their passes."""
        numbers = [self.numbers[i] for i in led]
        others = [(row, i) for row, leader in enumerate(led) for i in self._followers.get(leader, ())]
        further = FurtherAnswers(
            [row for row, _ in others],
            [int(data.rows[self.numbers[i]][0][-1]) for _, i in others],
            [self.weights[i] for _, i in others],
        )
        ids, labels = data.batch(numbers)
        weights = [self.weights[i] for i in led]
        return Portion(ids, labels, weights, further if others else None, led + [i for _, i in others])

    def units_of(self, led: list[int], labels: torch.Tensor) -> Units | None:
        """What of a portion with these labels is squared as one; ``None`` where every sequence is by itself."""
        if not self.questions.places:
            return None
        weights = torch.tensor([self.weights[i] for i in led])
        return self.questions.units(led, sequence_curvature(labels, weights))

    @cached_property
    def _followers(self) -> dict[int, list[int]]:
        """By leader the other positions that share its pass."""
        found: dict[int, list[int]] = {}
        for i, leader in enumerate(self.leaders):
            if leader != i:
                found.setdefault(leader, []).append(i)
        return found
