"""Which calibration sequences a step sees, and in which batches they pass through the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gisp.data import Sequences
from gisp.structures import ModelMap

# Logits of one pass over the whole set, in elements: bounds the largest temporary of the loss.
_LOGIT_ELEMENTS = {"cuda": 2**30, "cpu": 2**24}


class Sampler:
    """Which examples a step sees: a seeded shuffle of the set, walked through epoch after epoch.

    The choice is a function of seed and step alone, so a resumed run sees what an undisturbed one sees.
    """

    def __init__(self, examples: int, per_step: int, seed: int) -> None:
        self._examples = examples
        self._per_step = min(per_step, examples)
        self._seed = seed
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def numbers(self, step: int) -> list[int]:
        """Example numbers of a step (1-based)."""
        first = (step - 1) * self._per_step
        return [self._at(i) for i in range(first, first + self._per_step)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self._examples)
        return self._order(epoch)[offset]

    def _order(self, epoch: int) -> list[int]:
        if self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._shuffled = (epoch, torch.randperm(self._examples, generator=generator).tolist())
        return self._shuffled[1]


class StepBatches:
    """The sequences of every step of a run.

    Args:
        model_map: the model they pass through.
        data: calibration sequences.
        kind: ``stream``: each step a fresh batch of about ``tokens`` tokens; ``exact``: every step the whole set.
        batch_size: sequences per pass; ``None``: the whole step for ``stream``, for ``exact`` what keeps the logits
            small.
    """

    def __init__(
        self, model_map: ModelMap, data: Sequences, *, kind: str, batch_size: int | None, tokens: int, seed: int
    ) -> None:
        self.data = data
        self._kind = kind
        self._batch_size = batch_size
        self._vocab_size = model_map.vocab_size
        self._device = next(model_map.model.parameters()).device
        total = sum(len(data.rows[i][0]) for example in data.examples for i in example)
        per_step = max(1, round(tokens / (total / len(data.examples))))
        self._sampler = Sampler(len(data.examples), per_step, seed) if kind == "stream" else None

    @property
    def fresh(self) -> bool:
        """Whether every step has a batch of its own."""
        return self._sampler is not None

    def numbers(self, step: int) -> list[int]:
        """Sequence numbers of a step (1-based)."""
        examples = self._sampler.numbers(step) if self._sampler else range(len(self.data.examples))
        return [i for example in examples for i in self.data.examples[example]]

    def batches(self, numbers: list[int]) -> Iterator[tuple[int, int]]:
        """Consecutive stretches of ``numbers`` small enough for one pass."""
        size = self._batch_size
        if size is None and self._kind == "exact":
            longest = max(len(self.data.rows[i][0]) for i in numbers)
            limit = _LOGIT_ELEMENTS["cuda" if self._device.type == "cuda" else "cpu"]
            size = max(1, limit // (longest * self._vocab_size))
        size = size or len(numbers)
        for start in range(0, len(numbers), size):
            yield start, min(start + size, len(numbers))
