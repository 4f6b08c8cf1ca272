"""Between the device and the disk: results of a step on their way to the host, and when a finished step is written."""

from __future__ import annotations

import concurrent.futures
import math
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context

import torch

# Part of the time that a thread writes at most. Of a small model a write takes a third of a step, and as long the
# thread that launches kernels waits for it.
_SHARE = 0.05


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
    """Writes finished steps, at most one at a time.

    With ``overlap`` a thread writes while the next steps are computed. Steps that are finished meanwhile are not
    written one by one: the first one that is finished after the write, and after a rest, takes those before it along.
    What is on disk is then as many steps behind the run as end within a write and its rest, and a run killed in between
    repeats them when resumed, with the same result.

    Args:
        overlap: write while the run goes on; else a step is on disk when :meth:`take` returns.

    Attributes:
        held_up: seconds the last :meth:`take` kept the run waiting.
    """

    def __init__(self, overlap: bool) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="write") if overlap else None
        self._written: concurrent.futures.Future[None] | None = None
        self._left: Callable[[], None] | None = None
        self._rests_until = -math.inf
        self.held_up = 0.0

    def take(self, write: Callable[[], None]) -> None:
        """Write a step, or leave it to the next one.

        Args:
            write: of the step and those before it; nothing that it reads changes later. The next step may end within
                itself, and then this one is written as it was.

        Raises:
            GispError: of this write or the one before.
        """
        start = time.perf_counter()
        self._left = write
        if self._written is not None and self._written.done():
            self._end()
        if self._written is None and start >= self._rests_until:
            self._begin()
        self.held_up = time.perf_counter() - start

    def flush(self) -> None:
        """Return when everything is on disk; a write that failed is not tried again.

        Raises:
            GispError: of a write.
        """
        while self._written is not None or self._left is not None:
            self._end()
            self._begin()

    def close(self) -> None:
        """:meth:`flush`, also where Ctrl-C comes meanwhile, and end the thread."""
        try:
            self.flush()
        except KeyboardInterrupt:
            self.flush()
            raise
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def _end(self) -> None:
        """Wait for what is being written, and know that it is there."""
        written = self._written
        if written is None:
            return
        # Ctrl-C may end this, and all is still to be written then.
        concurrent.futures.wait([written])
        self._written = None
        try:
            written.result()
        except BaseException:
            self._left = None
            raise

    def _begin(self) -> None:
        """Begin to write what is left."""
        write, self._left = self._left, None
        if write is None:
            return
        if self._thread is None:
            write()
        else:
            # Among the context is that this process is the folder's one writer.
            self._written = self._thread.submit(copy_context().run, self._resting, write)

    def _resting(self, write: Callable[[], None]) -> None:
        """Write, then rest: the thread and the one that launches kernels take turns."""
        start = time.perf_counter()
        write()
        end = time.perf_counter()
        self._rests_until = end + (end - start) * (1 / _SHARE - 1)
