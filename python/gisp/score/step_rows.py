"""The sequences of one step: their weights, the questions among them, and which pass through the model together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from gisp.data import Sequences
from gisp.data.batches import StepBatches
from gisp.score.fused import Followers, MicroBatch, SampleGroups
from gisp.score.objectives import sequence_curvature
from gisp.score.questions import Questions


@dataclass(frozen=True)
class StepRows:
    """The sequences of a step.

    Attributes:
        data: where they come from.
        numbers: of the sequences in the data, by position in the step.
        weights: weight of each sequence's mean NLL in the loss.
        questions: those of the positions whose answers are compared.
        leaders: of every position the one whose pass it may share (see :mod:`gisp.score.fused.batch`).
        make_batches: makes ``batches`` when they are first asked for; of sequences of many lengths that takes
            milliseconds.
        correction: what the weighted sum of NLL lacks to the loss.
    """

    data: Sequences
    numbers: list[int]
    weights: list[float]
    questions: Questions
    leaders: list[int]
    make_batches: Callable[[], list[tuple[int, int]]]
    correction: float = 0.0

    @classmethod
    def of(cls, steps: StepBatches, step: int) -> StepRows:
        """The rows of a step (1-based)."""
        data, numbers, weights, places = steps.data, steps.numbers(step), steps.weights(step), steps.questions(step)
        questions = Questions.of(places, [data.signs[i] for i in numbers], weights)
        leaders = steps.leaders(step)
        return cls(data, numbers, weights, questions, leaders, _batches_of(steps, numbers, places, leaders))

    def part(self, steps: StepBatches, start: int, stop: int) -> StepRows:
        """The rows from one position to another, between examples; weights stay those in the loss of the step."""
        held = [i for i, place in enumerate(self.questions.places) if start <= place.start < stop]
        places = [self.questions.places[i] for i in held]
        questions = Questions(
            tuple(range(place.start - start, place.stop - start) for place in places),
            tuple(self.questions.weights[i] for i in held),
        )
        numbers, leaders = self.numbers[start:stop], [leader - start for leader in self.leaders[start:stop]]
        return StepRows(
            self.data,
            numbers,
            self.weights[start:stop],
            questions,
            leaders,
            _batches_of(steps, numbers, questions.places, leaders),
        )

    @property
    def batches(self) -> list[tuple[int, int]]:
        """Stretches of positions that pass through the model together."""
        return self.make_batches()

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model, padding included."""
        passes = [[len(self.data.rows[self.numbers[i]][0]) for i in self.leading(*batch)] for batch in self.batches]
        return sum(len(lengths) * max(lengths) for lengths in passes)

    @property
    def samples(self) -> int:
        """Independent parts of the loss: questions and sequences that are no answers."""
        return len(self.numbers) - sum(len(place) - 1 for place in self.questions.places)

    @property
    def opposed(self) -> bool:
        """Whether sequences that are no answers of questions pull the other way."""
        return any(weight < 0 for i, weight in enumerate(self.weights) if i not in self.questions.owners)

    def leading(self, start: int, stop: int) -> list[int]:
        """The positions from ``start`` to ``stop`` whose sequences pass through the model."""
        return [i for i in range(start, stop) if self.leaders[i] == i]

    def micro_batches(self) -> Iterator[MicroBatch]:
        """All sequences, by the passes that they take."""
        for start, stop in self.batches:
            yield self.micro_batch(self.leading(start, stop))

    def micro_batch(self, leading: list[int]) -> MicroBatch:
        """The sequences at leading positions and their followers."""
        others = [(row, i) for row, leader in enumerate(leading) for i in self._followers.get(leader, ())]
        followers = Followers(
            [row for row, _ in others],
            [int(self.data.rows[self.numbers[i]][0][-1]) for _, i in others],
            [self.weights[i] for _, i in others],
        )
        ids, labels = self.data.batch([self.numbers[i] for i in leading])
        weights = [self.weights[i] for i in leading]
        samples = None
        if self.questions.places:
            index, curvature = self.questions.samples(leading, sequence_curvature(labels, torch.tensor(weights)))
            samples = SampleGroups(index, curvature)
        positions = (*leading, *(i for _, i in others))
        return MicroBatch(ids, labels, weights, followers if others else None, samples, positions)

    @cached_property
    def _followers(self) -> dict[int, list[int]]:
        """By leader the other positions that share its pass."""
        found: dict[int, list[int]] = {}
        for i, leader in enumerate(self.leaders):
            if leader != i:
                found.setdefault(leader, []).append(i)
        return found


def _batches_of(
    steps: StepBatches, numbers: list[int], places: Sequence[range], leaders: Sequence[int]
) -> Callable[[], list[tuple[int, int]]]:
    """Makes batches of a step's sequences: neither questions are split nor those that share a pass."""

    @cache
    def batches() -> list[tuple[int, int]]:
        sharing = [range(leader, i + 1) for i, leader in enumerate(leaders) if leader != i]
        return list(steps.batches(numbers, [*places, *sharing])) if numbers else []

    return batches
