"""Whether this process gets on, seen from a thread beside the one that works.

A process that works is told from a stuck one by what it uses. Of the host that is time of the processor, wake-ups of
the working thread, bytes read and written, pages brought back from the disk. A thread that waits for a hung GPU may use
the host all the same, so a GPU is asked by itself: it is given numbers to write into host memory. A process that waits
for others is in order, whatever it uses: numbers on the same stream say when that begins and ends.

Numbers are read without the driver. A call of it waits for as long as another thread copies from a busy GPU, so a
thread of its own makes those that ask.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

# Seconds without any sign until a process counts as stuck. A disk or a GPU may take longer over one thing: disks that
# are found by a network come back after minutes.
STILL, DEVICE_STILL = 60.0, 180.0
# Share of a core below which threads only look whether there is something to do, and bytes that a log line changes.
_IDLE_CORE, _FEW_BYTES = 0.05, 65536
# How often a GPU is asked, and how many numbers there are, an even number.
PAUSE, NUMBERS = 1.0, 1024
_MARK, _PROBE = 0, 1


@dataclass(frozen=True)
class Sight:
    """What is seen of a process at a time.

    Attributes:
        waits: seconds that it has waited for other processes, ``None`` while it does not.
        stuck: what it shows no sign at, empty for one that gets on.
    """

    waits: float | None
    stuck: str = ""


class Cells:
    """Numbers that a device writes as it comes to them; a CPU is there at once."""

    behind = False

    def __init__(self) -> None:
        self._held = [0, 0]

    def write(self, cell: int, number: int) -> None:
        """Let a number be written once all is done that was begun before; ``number`` below :data:`NUMBERS`."""
        self._held[cell] = number

    def read(self, cell: int) -> int:
        """The last number that was written."""
        return self._held[cell]


class GpuCells(Cells):
    """Numbers that a GPU copies into pinned host memory, on the current stream of the thread that asks for it."""

    behind = True

    def __init__(self, device: torch.device) -> None:
        self._numbers = torch.arange(NUMBERS, device=device).unsqueeze(1).unbind()
        self._pinned = torch.zeros(2, dtype=torch.int64, pin_memory=True).split(1)

    def write(self, cell: int, number: int) -> None:
        """As :meth:`Cells.write`, once the stream comes to it."""
        self._pinned[cell].copy_(self._numbers[number], non_blocking=True)

    def read(self, cell: int) -> int:
        """As :meth:`Cells.read`; waits for nothing."""
        return int(self._pinned[cell])


class Signs:
    """Signs of the thread that makes it.

    Args:
        cells: of the device of collectives.
    """

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._thread = threading.get_native_id()
        # Begins and ends of waiting, in turn, that the thread came to, and how many of them the device had passed.
        self._made = self._passed = 0
        # When the GPU was asked last, and for which number.
        self._asked = (time.monotonic(), 0)
        self._failure = ""
        self._since = self._moved = time.monotonic()
        self._host: _Host | None = None
        self._elsewhere = False
        self._ended = threading.Event()
        if cells.behind:
            threading.Thread(target=self._ask, daemon=True).start()

    def end(self) -> None:
        """Ask no more."""
        self._ended.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what ends only when other processes have come to it too; for the thread that works."""
        self._mark()
        yield
        self._mark()

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Around what may stand still without being stuck; for the thread that works."""
        self._elsewhere = True
        yield
        self._elsewhere = False

    def look(self) -> Sight:
        """What is seen now; for the thread beside, every second or so. It never waits."""
        now, passed = time.monotonic(), self._cells.read(_MARK)
        if passed != self._passed:
            self._passed, self._host = passed, None
            self._since = self._moved = now
        if passed % 2:
            return Sight(now - self._since)
        if self._failure:
            return Sight(None, f"its GPU has failed ({self._failure})")
        asked, number = self._asked
        at_gpu = self._cells.behind and self._cells.read(_PROBE) != number
        host = _Host.of(self._thread)
        # A thread that waits for a busy GPU need not use anything.
        if at_gpu or self._elsewhere or self._host is None or host is None or host.differs(self._host):
            self._since, self._host = now, host
        if self._elsewhere:
            return Sight(None)
        if at_gpu and now - max(asked, self._moved) > DEVICE_STILL:
            return Sight(None, f"its GPU has done nothing for {DEVICE_STILL:.0f} s")
        limit = DEVICE_STILL if host is not None and host.at_disk else STILL
        if now - self._since <= limit:
            return Sight(None)
        return Sight(None, f"it {'waits for a disk' if limit > STILL else 'has done nothing'} for {limit:.0f} s")

    def _mark(self) -> None:
        self._made = (self._made + 1) % NUMBERS
        self._cells.write(_MARK, self._made)

    def _ask(self) -> None:
        """Ask the GPU for a number again and again, each once it has come to the one before."""
        number = 0
        try:
            while not self._ended.wait(PAUSE):
                if self._cells.read(_PROBE) == number:
                    number = (number + 1) % NUMBERS
                    self._asked = (time.monotonic(), number)
                    self._cells.write(_PROBE, number)
        except RuntimeError as error:
            self._failure = next(iter(str(error).splitlines()), "")


@dataclass(frozen=True)
class _Host:
    """What the working thread and its process have used of the host so far.

    Attributes:
        steps: wake-ups of the thread, and pages that the process had to wait for.
        processor: seconds of the processor, those of the thread beside left out and those of children that live, as
            compilers, counted.
        bytes: read from and written to disks.
        taken: when, by the monotonic clock.
        at_disk: whether a thread waits for a disk or a driver, in which nothing wakes it.
    """

    steps: int
    processor: float
    bytes: int
    taken: float
    at_disk: bool

    @classmethod
    def of(cls, thread: int) -> _Host | None:
        """What is used by now, asked for by the thread beside; ``None`` on systems that do not tell it."""
        try:
            status = Path(f"/proc/self/task/{thread}/status").read_text(encoding="utf-8").splitlines()
            stat = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            states = {_state(path) for path in Path("/proc/self/task").iterdir()}
        except (OSError, IndexError):
            return None
        wakes = sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)
        processor = time.process_time() - time.thread_time() + _children_seconds(thread)
        # Of /proc/PID/stat, by its manual: pages brought in, and time of children that have ended.
        steps = wakes + int(stat[9]) + int(stat[13]) + int(stat[14])
        return cls(steps, processor, _disk_bytes(), time.monotonic(), "D" in states)

    def differs(self, before: _Host) -> bool:
        """Whether what was used since then is work."""
        return (
            self.steps != before.steps
            or self.processor - before.processor > _IDLE_CORE * (self.taken - before.taken)
            or self.bytes - before.bytes > _FEW_BYTES
        )


def _children_seconds(thread: int) -> float:
    """Of the processor, used so far by the processes that a thread has started, and by those that these have."""
    seconds, waiting = 0.0, [f"/proc/self/task/{thread}"]
    while waiting:
        # Kernels without this file tell of children when they have ended.
        with suppress(OSError, IndexError):
            for child in Path(waiting.pop(), "children").read_text(encoding="utf-8").split():
                stat = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                seconds += (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
                waiting.append(f"/proc/{child}/task/{child}")
    return seconds


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        # It has ended meanwhile.
        return ""


def _disk_bytes() -> int:
    try:
        lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("read_bytes", "write_bytes")))
