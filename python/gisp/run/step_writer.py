"""When a finished step is written: at once on a CPU, and while a GPU already works on the next step."""

from __future__ import annotations

import time
from collections.abc import Callable


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
