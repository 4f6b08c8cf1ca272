"""Decoder layers that visit the device one after the other, forward and backward, the next one fetched meanwhile.

There are two slots of device memory, each of the size of a dense layer. While a layer computes in one, the next one of
the pass is copied into the other, on a stream of its own. A CPU copies first and then computes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn

from gisp.errors import GispError
from gisp.offload.boundaries import Boundaries, Taken
from gisp.offload.host import HostMemory
from gisp.offload.traffic import Clock, Traffic
from gisp.offload.weights import LayerWeights

_ATTRIBUTE = "gisp_layer_stream"


@dataclass
class _Slot:
    """Device memory for one layer; the events are of a GPU.

    Attributes:
        ready: the layer has arrived.
        free: the computation has read the layer that was here.
    """

    memory: torch.Tensor
    layer: int | None = None
    ready: torch.cuda.Event | None = None
    free: torch.cuda.Event | None = None


class LayerStream:
    """The layers of one model that lie in host memory, and its output projection if that does too.

    A forward pass of the whole model without gradients works anywhere: each layer comes when it is called. Code that
    goes through layers in an order of its own says so with :meth:`visiting`. The output projection has the number after
    that of the last layer.

    Args:
        layers: all decoder layers of the model, in order.
        streamed: numbers of those in host memory; others are on the device and stay there.
        head: the output projection, where it is in host memory.
        boundaries_on_host: as for :class:`gisp.offload.boundaries.Boundaries`.
        memory: what the layers lie in; it is held. ``None`` where files back them.

    Attributes:
        recomputes: whether every layer keeps its input alone, which its backward starts from.
        hooks: identities of the hooks that let layers come when they are called.
    """

    recomputes = True

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        streamed: Iterable[int],
        device: torch.device,
        *,
        head: nn.Module | None = None,
        boundaries_on_host: bool = False,
        memory: HostMemory | None = None,
    ) -> None:
        visitors = dict(enumerate(layers))
        self._memory = memory
        self._weights = {i: LayerWeights(visitors[i], mapped=memory is None) for i in streamed}
        if head is not None:
            end = len(visitors)
            visitors[end], self._weights[end] = head, LayerWeights(head, shrinks=False)
        self._device = device
        self._boundaries = Boundaries(device, boundaries_on_host)
        size = max((weights.bytes for weights in self._weights.values()), default=0)
        beside = max((weights.gaps for weights in self._weights.values()), default=0)
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(2)]
        self._beside = torch.empty(beside, dtype=torch.uint8, device=device)
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._clock = Clock()
        # Layers still to be visited, and those of them in host memory that are still to be fetched.
        self._visits: deque[int] = deque()
        self._coming: deque[int] = deque()
        self._explicit = False
        self._inside: int | None = None
        handles = []
        for i in self._weights:
            handles.append(visitors[i].register_forward_pre_hook(partial(self._called, i)))
            handles.append(visitors[i].register_forward_hook(partial(self._returned, i), always_call=True))
        self.hooks = frozenset(handle.id for handle in handles)
        setattr(model, _ATTRIBUTE, self)

    @classmethod
    def of(cls, model: Any) -> LayerStream | None:
        """The stream of a model, ``None`` where all its layers are on the device."""
        found: LayerStream | None = getattr(model, _ATTRIBUTE, None)
        return found

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter lies in host memory but for visits."""
        return any(weights.holds(parameter) for weights in self._weights.values())

    @property
    def traffic(self) -> Traffic:
        """What crossed to the device so far; waits for it."""
        return self._clock.traffic(wait=True)

    @contextmanager
    def visiting(self, order: Iterable[int]) -> Iterator[None]:
        """Go through layers in an order that is known before, by :meth:`visit`."""
        self._begin(order)
        self._explicit = True
        try:
            yield
        finally:
            self._explicit = False
            self._end()

    @contextmanager
    def visit(self, layer: int) -> Iterator[None]:
        """The layer's weights are on the device; the one visited after it is on its way."""
        self._enter(layer)
        try:
            yield
        finally:
            self._leave(layer)

    def keep(self, layer: int, states: torch.Tensor) -> Taken:
        """Put the input [T, D] of a layer aside until its backward; it is not changed by anyone meanwhile."""
        return self._boundaries.keep(layer, states)

    def _begin(self, order: Iterable[int]) -> None:
        self._end()
        self._visits = deque(order)
        self._coming = deque(i for i, _ in groupby(i for i in self._visits if i in self._weights))
        self._boundaries.begin()
        if self._copying is not None:
            self._copying.wait_stream(torch.cuda.current_stream(self._device))
        for slot in self._slots:
            self._fetch(slot)

    def _end(self) -> None:
        if self._inside is not None:
            self._weights[self._inside].hide()
        self._inside = None
        self._visits.clear()
        self._coming.clear()
        for slot in self._slots:
            slot.layer = slot.ready = slot.free = None

    def _enter(self, layer: int) -> None:
        if not self._visits or self._visits.popleft() != layer:
            raise RuntimeError(f"layer {layer} is visited out of turn")
        if self._visits:
            self._boundaries.announce(self._visits[0])
        if layer not in self._weights:
            return
        slot = self._slot_of(layer)
        if slot.ready is not None:
            self._clock.wait(slot.ready, torch.cuda.current_stream(self._device))
            slot.ready = None
        self._weights[layer].show()
        self._inside = layer

    def _leave(self, layer: int) -> None:
        if layer not in self._weights:
            return
        self._weights[layer].hide()
        self._inside = None
        if next((i for i in self._visits if i in self._weights), None) == layer:
            return
        if self._coming and self._coming[0] == layer:
            # It is needed again before it could have been away.
            self._coming.popleft()
            return
        slot = self._slot_of(layer)
        slot.layer = None
        if self._copying is not None:
            slot.free = torch.cuda.current_stream(self._device).record_event()
        self._fetch(slot)

    def _slot_of(self, layer: int) -> _Slot:
        return next(slot for slot in self._slots if slot.layer == layer)

    def _fetch(self, slot: _Slot) -> None:
        """Begin to copy the next layer into an empty slot."""
        if not self._coming:
            return
        slot.layer = self._coming.popleft()
        fetch = partial(self._weights[slot.layer].fetch, slot.memory, self._beside)
        # What is made in inference mode cannot be saved for a backward pass later.
        with torch.inference_mode(False), torch.no_grad():
            if self._copying is None:
                start = time.perf_counter()
                self._clock.add(fetch(), time.perf_counter() - start)
                return
            if slot.free is not None:
                self._copying.wait_event(slot.free)
            slot.ready = self._clock.copy(fetch, self._copying)

    def _called(self, layer: int, module: nn.Module, args: Any) -> None:
        """Hook of a layer of a forward pass of the whole model."""
        if self._explicit:
            return
        if torch.is_grad_enabled():
            raise GispError(
                "the layers of this model lie in host memory (--offload), it computes without gradients alone: "
                "call it under torch.no_grad()"
            )
        streamed = [i for i in self._weights if i >= layer]
        if list(self._visits) != streamed:
            self._begin(streamed)
        self._enter(layer)

    def _returned(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        if not self._explicit and self._inside == layer:
            self._leave(layer)


def check_in_one_place(model: Any, what: str) -> None:
    """Refuse a model whose layers lie in host memory.

    Args:
        what: needs all of it on one device.

    Raises:
        GispError: the model's layers visit the device.
    """
    if LayerStream.of(model) is not None:
        raise GispError(
            f"the layers of this model lie in host memory (--offload), {what} needs the whole model in one place: "
            "load it anew, or use gisp export RUN"
        )


def resident_or_streamed(model: Any) -> Visits:
    """How a pass goes through the layers of a model."""
    return LayerStream.of(model) or Resident()


class Resident:
    """Layers that are all on the device: nothing is fetched, inputs stay where they are."""

    recomputes = False

    def visiting(self, order: Iterable[int]) -> AbstractContextManager[None]:
        """As :meth:`LayerStream.visiting`."""
        return nullcontext()

    def visit(self, layer: int) -> AbstractContextManager[None]:
        """As :meth:`LayerStream.visit`."""
        return nullcontext()

    def keep(self, layer: int, states: torch.Tensor) -> Taken:
        """As :meth:`LayerStream.keep`."""
        return [states].pop


Visits = LayerStream | Resident
