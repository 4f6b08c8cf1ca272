"""The sequences of one step: their weights, the questions among them, and which pass through the model together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gisp.data import Sequences
from gisp.fused_pass import FurtherAnswers
from gisp.objectives import sequence_curvature
from gisp.questions import Questions, Units
from gisp.step_batches import StepBatches


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
        answers = {i for place in self.questions.places for i in place}
        return any(weight < 0 for i, weight in enumerate(self.weights) if i not in answers)

    def led(self, positions: range) -> list[int]:
        """The positions whose sequences pass through the model where answers share a pass."""
        return [i for i in positions if self.leaders[i] == i]

    def further(self, positions: range, led: list[int], data: Sequences) -> FurtherAnswers | None:
        """The answers of the other positions; ``None`` where there are none."""
        if len(led) == len(positions):
            return None
        row = {i: number for number, i in enumerate(led)}
        others = [i for i in positions if i not in row]
        return FurtherAnswers(
            [row[self.leaders[i]] for i in others],
            [int(data.rows[self.numbers[i]][0][-1]) for i in others],
            [self.weights[i] for i in others],
        )

    def units_of(self, positions: list[int], labels: torch.Tensor) -> Units | None:
        """What of a batch with these labels is squared as one; ``None`` where every sequence is by itself."""
        if not self.questions.places:
            return None
        weights = torch.tensor([self.weights[i] for i in positions])
        return self.questions.units(positions, sequence_curvature(labels, weights))
