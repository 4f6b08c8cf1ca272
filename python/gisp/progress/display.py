"""A live bar for a terminal, and lines now and then for a file or a pipe, both on standard error."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from gisp.progress.track import Progress

# A file gets its first line soon, so that a log shows what is under way, and later ones at growing distances. Of what
# nothing is done yet it hears late: that is over soon or is refused, and a refusal is one line.
FIRST_SECONDS, SECONDS, GROWTH, UNDONE_SECONDS = 2.0, 10.0, 0.05, 30.0
# Of a terminal: what the bar itself and the numbers beside it take.
_BAR_WIDTH, _NUMBERS_WIDTH = 14, 30


def clock(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def fitting(details: Sequence[str], width: int) -> str:
    """As many of the details, from the first on, as fit into so many columns."""
    text = ""
    for detail in details:
        longer = f"{text}  {detail}" if text else detail
        if len(longer) > width:
            break
        text = longer
    return text


class Bar:
    """Shows what is under way as bars, as wide as the terminal allows; they vanish when it ends."""

    def __init__(self, console: Console | None = None) -> None:
        # What is under way may be named after a file, and names of files are no markup.
        self.console = console or Console(stderr=True, highlight=False, emoji=False)
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=_BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("{task.fields[details]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
        ]
        self._bars = RichProgress(*columns, console=self.console, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        known = self._tasks.get(progress.what)
        if progress.ended:
            if known is not None:
                self._bars.remove_task(self._tasks.pop(progress.what))
            if not self._tasks:
                self._bars.stop()
            return
        left = "" if progress.left is None else f"{clock(progress.left)} left"
        room = self.console.width - len(progress.what) - _BAR_WIDTH - _NUMBERS_WIDTH
        fields: dict[str, Any] = {"details": fitting(progress.details, room), "left": left}
        if known is None:
            self._bars.start()
            self._tasks[progress.what] = self._bars.add_task(
                progress.what, total=progress.total, completed=progress.done, **fields
            )
        else:
            self._bars.update(known, completed=progress.done, **fields)

    def say(self, message: str) -> None:
        """One line above the bars."""
        self.console.print(message, soft_wrap=True, markup=False)


class Lines:
    """Says what is under way and how far, seldom; also while nothing is heard of it.

    Args:
        write: takes a line; standard error where none is given.
        every: say all that is heard.
        now: seconds of a clock.
    """

    def __init__(
        self,
        write: Callable[[str], None] | None = None,
        *,
        every: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._every, self._now = write or _to_stderr, every, now
        self._open: dict[str, tuple[Progress, float]] = {}
        self._said: set[str] = set()
        self._started = now()
        self._last: float | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            if progress.ended:
                self._open.pop(progress.what, None)
                # What was spoken of is seen to end.
                if progress.what in self._said and progress.total is not None and not self._every:
                    self._say(progress, self._now())
                self._said.discard(progress.what)
                return
            self._open[progress.what] = (progress, self._now())
            if self._every and (progress.done > progress.begun or progress.total is None):
                self._say(progress, self._now())
        self.look()

    def look(self) -> None:
        """Say how far the latest is that is under way for long enough, where it is time to."""
        with self._lock:
            now = self._now()
            if self._last is not None and now - self._last < max(SECONDS, GROWTH * (now - self._started)):
                return
            for progress, heard in reversed(self._open.values()):
                # By its own time: on a busy machine imports alone take long.
                least = FIRST_SECONDS if progress.done > progress.begun else UNDONE_SECONDS
                if progress.seconds + now - heard >= least:
                    self._say(progress, now)
                    return

    def say(self, message: str) -> None:
        """One line of its own."""
        with self._lock:
            self._write(message)

    def _say(self, progress: Progress, now: float) -> None:
        heard = self._open[progress.what][1] if progress.what in self._open else now
        parts = [progress.what if progress.total is None else f"{progress.what} {progress.done}/{progress.total}"]
        parts += [*progress.details, clock(progress.seconds + now - heard)]
        if progress.left is not None and not progress.ended:
            parts.append(f"{clock(progress.left)} left")
        self._write("  ".join(parts))
        self._last = now
        self._said.add(progress.what)

    def _watch(self) -> None:
        while not self._stopped.wait(1.0):
            self.look()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
