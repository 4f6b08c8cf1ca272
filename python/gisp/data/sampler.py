"""Which examples a step of the ``stream`` engine sees."""

from __future__ import annotations

from itertools import accumulate

import torch

from gisp.data import Part, Sequences

# Seeds of the tasks of a mixture lie this far apart.
_SEED_STRIDE = 7919


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


class StratifiedSampler:
    """About ``batch_tokens`` tokens a step: of every task of a mixture its weight's part, and at least one example.

    Parts in proportion to the weights are what a given number of tokens estimates the weighted loss best with, where
    the tasks' gradients vary equally.
    """

    def __init__(self, data: Sequences, batch_tokens: int, seed: int) -> None:
        parts = data.parts or (Part("", "", 1.0, len(data.examples)),)
        self._firsts = list(accumulate((part.examples for part in parts), initial=0))[:-1]
        self._samplers = []
        for number, (first, part) in enumerate(zip(self._firsts, parts, strict=True)):
            tokens = sum(data.tokens_of(example) for example in range(first, first + part.examples))
            per_step = max(1, round(part.weight * batch_tokens / (tokens / part.examples)))
            self._samplers.append(Sampler(part.examples, per_step, seed + number * _SEED_STRIDE))

    def numbers(self, step: int) -> list[int]:
        """Example numbers of a step (1-based), task after task."""
        drawn = zip(self._firsts, self._samplers, strict=True)
        return [first + number for first, sampler in drawn for number in sampler.numbers(step)]
