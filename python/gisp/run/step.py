"""Between the device and the disk: results of a step on their way to the host, and when a finished step is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


class Transfer:
    """Copies tensors of one device to the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: dict[tuple[int, torch.dtype, torch.Size], torch.Tensor] = {}

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors on the CPU, valid until the next call; waits for the device once, for all of them."""
        if self._device.type != "cuda":
            return list(tensors)
        # Memory of the host that is not pinned would be waited for tensor by tensor.
        fetched = [self._pinned_like(i, tensor) for i, tensor in enumerate(tensors)]
        for target, tensor in zip(fetched, tensors, strict=True):
            target.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return fetched

    def _pinned_like(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        key = (number, tensor.dtype, tensor.shape)
        if key not in self._pinned:
            self._pinned[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return self._pinned[key]


class StepWriter:
    """Runs one write per step.

    Args:
        overlap: keep a write back until :meth:`flush`, which the loop calls when the device has work and the host would
            wait. A run killed in between repeats that step when resumed, with the same result.

    Attributes:
        held_up: seconds the last write kept the run waiting, 0 if it was overlapped.
    """

    def __init__(self, overlap: bool) -> None:
        self._overlap = overlap
        self._waiting: Callable[[], None] | None = None
        self.held_up = 0.0

    def take(self, write: Callable[[], None]) -> None:
        """Run ``write`` now or keep it back."""
        if self._overlap:
            self._waiting = write
            return
        start = time.perf_counter()
        write()
        self.held_up = time.perf_counter() - start

    def flush(self) -> None:
        """Run what was kept back, if anything; it is not run twice if it fails."""
        write, self._waiting = self._waiting, None
        if write is not None:
            write()
