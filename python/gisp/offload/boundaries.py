"""Inputs of layers between the forward and the backward pass: on the device, or in host memory and back in time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gisp.offload.host import HostMemory

# Gives the input back, once.
Taken = Callable[[], torch.Tensor]


class Boundaries:
    """Where the inputs of streamed layers wait.

    Args:
        on_host: in host memory, because the device does not hold those of all layers.
    """

    def __init__(self, device: torch.device, on_host: bool) -> None:
        self._on_host = on_host
        self._memory = HostMemory(device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" and on_host else None
        self._device = device
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}
        self._waiting: dict[int, list[_Away]] = {}

    def begin(self) -> None:
        """Start a pass: nothing waits."""
        self._waiting.clear()

    def keep(self, layer: int, states: torch.Tensor) -> Taken:
        """Put the input [T, D] of a layer aside; it is not changed by anyone meanwhile."""
        if not self._on_host:
            held = [states]
            return held.pop
        away = _Away(states, self._buffer(layer, states), self._side)
        self._waiting.setdefault(layer, []).append(away)
        return away.take

    def announce(self, layer: int) -> None:
        """Bring the inputs of a layer back that is visited next."""
        for away in self._waiting.pop(layer, []):
            away.start()

    def _buffer(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """Host memory for the next input of a layer, used again in every pass."""
        key = layer, len(self._waiting.get(layer, ()))
        held = self._buffers.get(key)
        if held is None or held.numel() < states.numel() or held.dtype != states.dtype:
            if held is not None:
                self._settle()
                self._memory.free(held)
            held = self._buffers[key] = self._memory.empty((states.numel(),), states.dtype)
        return held[: states.numel()].view(states.shape)

    def _settle(self) -> None:
        if self._side is not None:
            self._side.synchronize()


class _Away:
    """One input in host memory."""

    def __init__(self, states: torch.Tensor, home: torch.Tensor, side: torch.cuda.Stream | None) -> None:
        self._home, self._side, self._device = home, side, states.device
        self._back: torch.Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        if side is None:
            home.copy_(states)
            return
        side.wait_stream(torch.cuda.current_stream(states.device))
        with torch.cuda.stream(side):
            home.copy_(states, non_blocking=True)
        states.record_stream(side)

    def start(self) -> None:
        if self._back is not None:
            return
        if self._side is None:
            self._back = self._home.to(self._device, copy=True)
            return
        with torch.cuda.stream(self._side):
            self._back = self._home.to(self._device, non_blocking=True)
            self._ready = self._side.record_event()

    def take(self) -> torch.Tensor:
        self.start()
        back, self._back = self._back, None
        assert back is not None
        if self._ready is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(self._ready)
            back.record_stream(here)
        return back
