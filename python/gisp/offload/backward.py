"""Loss and gradients of a model whose layers come one after the other: autograd over one layer at a time.

A forward pass keeps the input of every layer alone. In the backward pass a layer runs again from it, with a graph of
its own, and the gradient of its output goes through that. These are the operations that autograd does over the whole
model, on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gisp.model.modes import replaced_forward
from gisp.offload.boundaries import Taken
from gisp.offload.stream import LayerStream


class LayerwiseBackward:
    """Backward passes of a model with a layer stream.

    Args:
        model: a causal language model with its layers at ``model.layers``.
    """

    def __init__(self, model: Any, stream: LayerStream) -> None:
        self._model, self._stream = model, stream
        self._layers: list[nn.Module] = [*model.model.layers]

    def run(
        self,
        ids: Sequence[torch.Tensor],
        loss_of: Callable[[int], torch.Tensor],
        lowest: int,
        recorded: Callable[[int], AbstractContextManager[Callable[[int], None]]],
    ) -> list[torch.Tensor]:
        """Pass batches through the model and back, all of them through a layer before the next one.

        Args:
            ids: int64 [B, S] of every batch, on the device.
            loss_of: the loss of the batch of a number, 0-dim, from one call of the model with its ids.
            lowest: no gradient goes below this layer; the number of layers for no gradient at all.
            recorded: what is entered around the backward of a layer; it gives what is told the number of every batch
                before it passes.

        Returns:
            The losses of the batches, without graph.
        """
        count = len(self._layers)
        down = [*reversed(range(lowest, count))]
        with self._stream.visiting([*range(count), count, *down]):
            called = [self._arguments(batch) for batch in ids]
            states = [first for first, _ in called]
            kept = self._forward(states, [arguments for _, arguments in called], lowest)
            with self._stream.visit(count):
                losses = [self._end(states, number, loss_of, bool(down)) for number in range(len(states))]
            for i in down:
                with self._stream.visit(i), recorded(i) as passes:
                    for number, (_, arguments) in enumerate(called):
                        passes(number)
                        start = kept[number].pop()().detach().requires_grad_(i > lowest)
                        with torch.enable_grad():
                            output = self._call(i, start, arguments[i])
                        output.backward(states[number])
                        if i > lowest:
                            states[number] = _grad(start)
        return losses

    def _end(
        self, states: list[torch.Tensor], number: int, loss_of: Callable[[int], torch.Tensor], back: bool
    ) -> torch.Tensor:
        """Loss of a batch from the states after the last layer; its gradient takes their place."""
        output = states[number] = states[number].detach().requires_grad_(back)
        with self._replaced([self._pass_on] * (len(self._layers) - 1) + [_giving(output)]):
            loss = loss_of(number)
        if back:
            loss.backward()
            states[number] = _grad(output)
        return loss.detach()

    @torch.no_grad()
    def _forward(
        self, states: list[torch.Tensor], arguments: list[list[dict[str, Any]]], lowest: int
    ) -> list[list[Taken]]:
        """Take the states of all batches from the first layer to the end; the inputs of layers from ``lowest``."""
        kept: list[list[Taken]] = [[] for _ in states]
        for i in range(len(self._layers)):
            with self._stream.visit(i):
                for number, start in enumerate(states):
                    if i >= lowest:
                        kept[number].append(self._stream.keep(i, start))
                    states[number] = self._call(i, start, arguments[number][i])
        return kept

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

    @contextmanager
    def _replaced(self, forwards: Sequence[Callable[..., torch.Tensor]]) -> Iterator[None]:
        """Other forwards of the layers for a while."""
        with ExitStack() as stack:
            for layer, forward in zip(self._layers, forwards, strict=True):
                stack.enter_context(replaced_forward(layer, forward))
            yield

    @staticmethod
    def _pass_on(states: torch.Tensor, **_: Any) -> torch.Tensor:
        return states


def _giving(states: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda *_, **__: states


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad
