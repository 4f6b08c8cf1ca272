"""Passes of a model whose layers come one after the other: all batches go through a layer before the next one.

A layer in host memory is so fetched once a pass, whatever the number of batches, and what a caller makes of a layer's
weights is made once. Gradients are those of autograd over one layer at a time. A forward pass keeps the input of every
layer alone, and in the backward pass a layer runs again from it, with a graph of its own; or it keeps the graphs. These
are the operations that autograd does over the whole model, on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from gisp.model.modes import replaced_forward
from gisp.offload.boundaries import Taken
from gisp.offload.stream import Visits

Inside = Callable[[int], AbstractContextManager[object]]
"""What is entered while all batches go through the layer of a number, whose weights are on the device."""

# Gives the input of a layer and, computed from it, the output, once.
_Passed = Callable[[], tuple[torch.Tensor, ...]]


def as_it_is(_: int) -> AbstractContextManager[object]:
    """A layer computes as it is."""
    return nullcontext()


class LayerwisePasses:
    """Passes of a model by layers.

    Args:
        model: a causal language model with its layers at ``model.layers``.
        visits: how its layers come.
    """

    def __init__(self, model: Any, visits: Visits) -> None:
        self._model, self._visits = model, visits
        self._layers: list[nn.Module] = [*model.model.layers]

    @torch.no_grad()
    def states(self, ids: Sequence[torch.Tensor], inside: Inside = as_it_is) -> list[torch.Tensor]:
        """What the head reads of every batch, [B, S, D].

        Args:
            ids: int64 [B, S] of every batch, on the device.
        """
        with self._visits.visiting(range(len(self._layers))):
            called = [self._arguments(batch) for batch in ids]
            states = [first for first, _ in called]
            self._forward(states, [arguments for _, arguments in called], len(self._layers), inside, graphs=False)
        for number, (batch, output) in enumerate(zip(ids, states, strict=True)):
            with self._ending_with(output):
                states[number] = self._model.model(input_ids=batch, use_cache=False).last_hidden_state
        return states

    def run(
        self,
        ids: Sequence[torch.Tensor],
        loss_of: Callable[[int], torch.Tensor],
        lowest: int,
        recorded: Callable[[int], AbstractContextManager[Callable[[int], None]]],
        inside: Inside = as_it_is,
        *,
        graphs: bool = False,
    ) -> list[torch.Tensor]:
        """Pass batches through the model and back.

        Args:
            ids: int64 [B, S] of every batch, on the device.
            loss_of: the loss of the batch of a number, 0-dim, from one call of the model with its ids.
            lowest: no gradient goes below this layer; the number of layers for no gradient at all.
            recorded: what is entered around the backward of a layer; it gives what is told the number of every batch
                before it passes.
            inside: entered around a layer's forward and around its backward.
            graphs: keep the graphs of all layers instead of running them again; for layers that stay on the device.

        Returns:
            The losses of the batches, without graph.
        """
        count = len(self._layers)
        down = [*reversed(range(lowest, count))]
        with self._visits.visiting([*range(count), count, *down]):
            called = [self._arguments(batch) for batch in ids]
            states = [first for first, _ in called]
            passed = self._forward(states, [arguments for _, arguments in called], lowest, inside, graphs=graphs)
            # The end of the model has the number after that of the last layer.
            with self._visits.visit(count):
                losses = [self._end(states, number, loss_of, bool(down)) for number in range(len(states))]
            for i in down:
                with self._visits.visit(i), inside(i), recorded(i) as passes:
                    for number in range(len(ids)):
                        passes(number)
                        start, output = passed[number].pop()()
                        output.backward(states[number])
                        if i > lowest:
                            states[number] = _grad(start)
        return losses

    def _end(
        self, states: list[torch.Tensor], number: int, loss_of: Callable[[int], torch.Tensor], back: bool
    ) -> torch.Tensor:
        """Loss of a batch from the states after the last layer; its gradient takes their place."""
        output = states[number] = states[number].detach().requires_grad_(back)
        with self._ending_with(output), torch.enable_grad():
            loss = loss_of(number)
        if back:
            loss.backward()
            states[number] = _grad(output)
        return loss.detach()

    @torch.no_grad()
    def _forward(
        self,
        states: list[torch.Tensor],
        arguments: list[list[dict[str, Any]]],
        lowest: int,
        inside: Inside,
        *,
        graphs: bool,
    ) -> list[list[_Passed]]:
        """Take the states of all batches from the first layer to the end; what layers from ``lowest`` did."""
        passed: list[list[_Passed]] = [[] for _ in states]
        for i in range(len(self._layers)):
            with self._visits.visit(i), inside(i):
                for number, start in enumerate(states):
                    own = arguments[number][i]
                    if i >= lowest and graphs:
                        both = self._traced(i, [start].pop, own, i > lowest)
                        states[number] = both[1].detach()
                        passed[number].append([both].pop)
                        continue
                    if i >= lowest:
                        passed[number].append(partial(self._traced, i, self._visits.keep(i, start), own, i > lowest))
                    states[number] = self._call(i, start, own)
        return passed

    def _traced(self, layer: int, taken: Taken, arguments: dict[str, Any], wanted: bool) -> tuple[torch.Tensor, ...]:
        """The input of a layer, whose gradient is wanted or not, and the output with its graph."""
        start = taken().detach().requires_grad_(wanted)
        with torch.enable_grad():
            return start, self._call(layer, start, arguments)

    def _call(self, layer: int, states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        output = self._layers[layer](states, **arguments)
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found

    @torch.no_grad()
    def _arguments(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """What the first layer reads, and what the decoder hands to every layer beside the states."""
        first: list[torch.Tensor] = []
        arguments: list[dict[str, Any]] = []

        def record(states: torch.Tensor, **given: Any) -> torch.Tensor:
            if not first:
                first.append(states)
            arguments.append(given)
            return states

        with self._replaced([record] * len(self._layers)):
            self._model.model(input_ids=ids, use_cache=False)
        return first[0], arguments

    def _ending_with(self, states: torch.Tensor) -> AbstractContextManager[None]:
        """Layers that do nothing, the last of which gives these states, [B, S, D]."""
        return self._replaced([_pass_on] * (len(self._layers) - 1) + [lambda *_, **__: states])

    @contextmanager
    def _replaced(self, forwards: Sequence[Callable[..., torch.Tensor]]) -> Iterator[None]:
        """Other forwards of the layers for a while."""
        with ExitStack() as stack:
            for layer, forward in zip(self._layers, forwards, strict=True):
                stack.enter_context(replaced_forward(layer, forward))
            yield


def _pass_on(states: torch.Tensor, **_: Any) -> torch.Tensor:
    return states


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad
