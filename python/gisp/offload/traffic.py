"""What crosses between host and device, in bytes and seconds, and how long the computation waited for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

_Interval = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass(frozen=True)
class Traffic:
    """Copies of weights to the device.

    Attributes:
        bytes: that crossed.
        seconds: of the copies.
        exposed: seconds that the computation waited for them.
    """

    bytes: int = 0
    seconds: float = 0.0
    exposed: float = 0.0

    @property
    def overlap(self) -> float:
        """Share of the copies' time in which the device computed."""
        return 1 - min(1.0, self.exposed / self.seconds) if self.seconds else 1.0

    def since(self, before: Traffic) -> Traffic:
        """What crossed after an earlier look."""
        return Traffic(self.bytes - before.bytes, self.seconds - before.seconds, self.exposed - before.exposed)


class Clock:
    """Times copies and waits where they happen, on the streams of a GPU."""

    def __init__(self) -> None:
        self._found = Traffic()
        self._copies: list[_Interval] = []
        self._waits: list[_Interval] = []

    def add(self, size: int, seconds: float) -> None:
        """Take in a copy that the computation waited for from end to end."""
        found = self._found
        self._found = Traffic(found.bytes + size, found.seconds + seconds, found.exposed + seconds)

    def copy(self, run: Callable[[], int], stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Run a copy on a stream; ``run`` gives its bytes. The event that marks its end."""
        self.traffic(wait=False)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            start.record(stream)
            size = run()
            end.record(stream)
        self._copies.append((start, end))
        self._found = replace(self._found, bytes=self._found.bytes + size)
        return end

    def wait(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        """Let a stream wait for a copy."""
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        stream.wait_event(event)
        after.record(stream)
        self._waits.append((before, after))

    def traffic(self, *, wait: bool) -> Traffic:
        """What crossed so far; without ``wait`` only what is known already."""
        seconds, self._copies = _read(self._copies, wait)
        exposed, self._waits = _read(self._waits, wait)
        found = self._found
        self._found = replace(found, seconds=found.seconds + seconds, exposed=found.exposed + exposed)
        return self._found


def _read(intervals: list[_Interval], wait: bool) -> tuple[float, list[_Interval]]:
    """Seconds of the intervals that are over, and the others."""
    total, left = 0.0, list(intervals)
    while left and (wait or left[0][1].query()):
        start, end = left.pop(0)
        end.synchronize()
        total += start.elapsed_time(end) / 1000
    return total, left
