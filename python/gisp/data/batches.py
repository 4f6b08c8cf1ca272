"""Which calibration sequences a step sees, and in which batches they pass through the model."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import accumulate, pairwise

import torch

from gisp.data.sequences import Sequences, Task
from gisp.model.structures import ModelMap

# Logits of one pass over the whole set, in elements: bounds the largest temporary of the loss.
_LOGIT_ELEMENTS = {"cuda": 2**29, "cpu": 2**24}
# Logits of a forward pass alone, in elements.
_FORWARD_ELEMENTS = 2**26
# What autograd keeps of one pass for its backward, in bytes; of a large model a few sequences reach it.
_ACTIVATION_BYTES = {"cuda": 2**33, "cpu": 2**32}
# A pass takes about as long as this many tokens more: a model's launches and small kernels.
_PASS_TOKENS = 2048
# Where a step may be split; with more places the best ones would take more than milliseconds to find.
_MOST_PLACES = 128
# Seeds of the tasks of a mixture lie this far apart.
_SEED_STRIDE = 7919


class StepBatches:
    """The sequences of every step of a run.

    Args:
        model_map: the model they pass through.
        data: calibration sequences.
        kind: ``stream``: each step a fresh batch of about ``tokens`` tokens; ``exact``: every step the whole set.
        batch_size: sequences per pass; ``None``: for ``stream`` the whole step or what ``parts`` makes of it, for
            ``exact`` what keeps logits and activations small.
        parts: whether sequences of a step that differ much in length pass one kind after the other.
    """

    def __init__(
        self,
        model_map: ModelMap,
        data: Sequences,
        *,
        kind: str,
        batch_size: int | None,
        tokens: int,
        seed: int,
        parts: bool = False,
    ) -> None:
        self.data = data
        self._kind = kind
        self._batch_size = batch_size
        self._parts = parts
        self._vocab_size = model_map.vocab_size
        weight = model_map.weight
        self._device = weight.device
        # About what plain transformers layers keep of a token: norms, projections, rotary and attention are some 16
        # vectors of the hidden size, the MLP 4 of its width.
        per_layer = 16 * model_map.hidden_size + 4 * model_map.intermediate_size
        self._token_bytes = len(model_map.layers) * per_layer * weight.element_size()
        self._sampler = StratifiedSampler(data, tokens, seed) if kind == "stream" else None

    @property
    def fresh(self) -> bool:
        """Whether every step has a batch of its own."""
        return self._sampler is not None

    def numbers(self, step: int) -> list[int]:
        """Sequence numbers of a step (1-based)."""
        return [i for example in self._examples(step) for i in self.data.examples[example]]

    def unseen(self, steps: int) -> list[int]:
        """Numbers of the examples that none of the first ``steps`` steps sees."""
        seen = {example for step in range(1, steps + 1) for example in self._examples(step)}
        return [number for number in range(len(self.data.examples)) if number not in seen]

    def weights(self, step: int) -> list[float]:
        """Weight in the step's loss of every sequence of :meth:`numbers`."""
        return self.data.weights(self._examples(step))

    def small(self, numbers: list[int], positions: list[int]) -> Iterator[list[int]]:
        """Positions in stretches whose logits are small, for a forward pass alone."""
        if positions:
            longest = max(len(self.data.rows[numbers[i]][0]) for i in positions)
            size = max(1, _FORWARD_ELEMENTS // (self._vocab_size * longest))
            for start in range(0, len(positions), size):
                yield positions[start : start + size]

    def questions(self, step: int) -> list[range]:
        """Positions in :meth:`numbers` of examples whose answers are compared with one another."""
        found, start = [], 0
        for example in self._examples(step):
            stop = start + len(self.data.examples[example])
            if self.data.compares(example):
                found.append(range(start, stop))
            start = stop
        return found

    def leaders(self, step: int) -> list[int]:
        """For every position the one whose pass it may share, see :meth:`gisp.data.Sequences.leaders`."""
        found: list[int] = []
        for example in self._examples(step):
            start = len(found)
            found += [start + leader for leader in self.data.leaders(example)]
        return found

    def slices(self, step: int, count: int) -> list[tuple[int, int]]:
        """Positions of a step in so many consecutive stretches of about equally many examples; none is split.

        A stretch is empty where there are fewer examples.
        """
        sizes = [len(self.data.examples[example]) for example in self._examples(step)]
        ends = list(accumulate(sizes, initial=0))
        bounds = [ends[i * len(sizes) // count] for i in range(count + 1)]
        return list(pairwise(bounds))

    def _examples(self, step: int) -> Sequence[int]:
        return self._sampler.numbers(step) if self._sampler else range(len(self.data.examples))

    def batches(
        self, numbers: list[int], together: Sequence[range] = (), *, bounded: bool = False
    ) -> Iterator[tuple[int, int]]:
        """Consecutive stretches of ``numbers`` small enough for one pass; positions ``together`` are never split.

        Args:
            bounded: without a batch size, keep logits and activations of a fresh batch small as well.
        """
        size = self._batch_size
        if size is None and self._parts and self._kind == "stream" and not bounded:
            inside = {position for place in together for position in place[1:]}
            yield from even_stretches([len(self.data.rows[i][0]) for i in numbers], inside)
            return
        if size is None and (bounded or self._kind == "exact"):
            longest = max(len(self.data.rows[i][0]) for i in numbers)
            kind = "cuda" if self._device.type == "cuda" else "cpu"
            tokens = min(_LOGIT_ELEMENTS[kind] // self._vocab_size, _ACTIVATION_BYTES[kind] // self._token_bytes)
            size = max(1, tokens // longest)
        size = size or len(numbers)
        inside = {position for place in together for position in place[1:]}
        start = 0
        while start < len(numbers):
            stop = min(start + size, len(numbers))
            while stop in inside:
                stop += 1
            yield start, stop
            start = stop


def even_stretches(lengths: Sequence[int], inside: Container[int]) -> list[tuple[int, int]]:
    """The consecutive stretches of sequences that pass through a model in the least time.

    The rows of a pass are padded to its longest one. A mixture of short questions and long texts would be padding for
    the most part; a pass more takes time of its own.

    Args:
        lengths: tokens of every sequence, at least one.
        inside: positions that stay with the one before.
    """
    if max(lengths) * len(lengths) - sum(lengths) <= _PASS_TOKENS:
        return [(0, len(lengths))]
    places = [i for i in range(len(lengths)) if i not in inside]
    places = [*places[:: -(-len(places) // _MOST_PLACES)], len(lengths)]
    longest = [max(lengths[start:stop]) for start, stop in pairwise(places)]
    # Of every place the least time up to there, and where the last pass began.
    least: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(places)):
        most, best = 0, (0, -1)
        for start in reversed(range(stop)):
            most = max(most, longest[start])
            took = least[start][0] + _PASS_TOKENS + most * (places[stop] - places[start])
            best = (took, start) if best[1] < 0 else min(best, (took, start))
        least.append(best)
    found, stop = [], len(places) - 1
    while stop:
        start = least[stop][1]
        found.append((places[start], places[stop]))
        stop = start
    return found[::-1]


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
    """About ``batch_tokens`` tokens a step: of every task of a mixture its weight's share, and at least one example.

    Shares in proportion to the weights are what a given number of tokens estimates the weighted loss best with, where
    the tasks' gradients vary equally.
    """

    def __init__(self, data: Sequences, batch_tokens: int, seed: int) -> None:
        tasks = data.tasks or (Task("", "", 1.0, len(data.examples)),)
        self._firsts = list(accumulate((task.examples for task in tasks), initial=0))[:-1]
        self._samplers = []
        for number, (first, task) in enumerate(zip(self._firsts, tasks, strict=True)):
            tokens = sum(data.tokens_of(example) for example in range(first, first + task.examples))
            per_step = max(1, round(task.weight * batch_tokens / (tokens / task.examples)))
            self._samplers.append(Sampler(task.examples, per_step, seed + number * _SEED_STRIDE))

    def numbers(self, step: int) -> list[int]:
        """Example numbers of a step (1-based), task after task."""
        drawn = zip(self._firsts, self._samplers, strict=True)
        return [first + number for first, sampler in drawn for number in sampler.numbers(step)]
