"""Loops tell how far they are; whoever called them says who hears it.

A loop deep inside an evaluation knows how far it is, the command far above knows whether anyone looks. Between them
stands a context variable: no function in between passes anything on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Progress:
    """How far something is.

    Attributes:
        what: is done, as ``evaluating``.
        done, total: units of it; ``total`` is ``None`` where it is not known.
        seconds: since it began.
        begun: units that were done when it began (a resumed run).
        details: further words, the most telling first.
        ended: whether this is the last that is heard of it.
    """

    what: str
    done: int
    total: int | None
    seconds: float
    begun: int = 0
    details: tuple[str, ...] = ()
    ended: bool = False

    @property
    def left(self) -> float | None:
        """Seconds to the end at the speed so far; ``None`` where that is not known."""
        if self.total is None or self.done <= self.begun:
            return None
        return self.seconds / (self.done - self.begun) * (self.total - self.done)


Report = Callable[[Progress], None]
# What this process is at, the innermost last, for whoever looks from another thread.
_under_way: list[Task] = []
# Who hears what begins from now on.
heard_by: ContextVar[Report | None] = ContextVar("gisp_progress", default=None)


class Task:
    """Something under way; made by :func:`task`.

    Attributes:
        phase: of the unit that is being done, empty where it has none.
    """

    def __init__(self, what: str, total: int | None, begun: int) -> None:
        self._what, self._total, self._begun = what, total, begun
        self._done = begun
        self._details: tuple[str, ...] = ()
        self.phase = ""
        self._report = heard_by.get()
        self._start = time.perf_counter()
        self._tell(False)

    def advance(self, count: int = 1, details: Sequence[str] = ()) -> None:
        """So many more units are done."""
        self._done += count
        self._details = tuple(details)
        self._tell(False)

    def words(self) -> str:
        """How far it is, as ``pruning, 3 of 50 done, select``."""
        done = "" if self._total is None else f", {self._done} of {self._total} done"
        return f"{self._what}{done}{self.phase and ', '}{self.phase}"

    def end(self) -> None:
        """Nothing more follows."""
        self._tell(True)

    def _tell(self, ended: bool) -> None:
        if self._report is not None:
            seconds = time.perf_counter() - self._start
            self._report(Progress(self._what, self._done, self._total, seconds, self._begun, self._details, ended))


def note(message: str) -> None:
    """A remark in one line, to a bar or lines; a callable of the user's does not hear it."""
    say = getattr(heard_by.get(), "say", None)
    if say is not None:
        say(message)


def hears_notes() -> bool:
    """Whether anyone would hear a remark."""
    return hasattr(heard_by.get(), "say")


@contextmanager
def task(what: str, total: int | None = None, begun: int = 0) -> Iterator[Task]:
    """Something under way of ``total`` units, ``None`` where it has none, to be told how far it is."""
    running = Task(what, total, begun)
    _under_way.append(running)
    try:
        yield running
    finally:
        _under_way.remove(running)
        running.end()


def phase(name: str) -> None:
    """A unit of the innermost task has come to a phase."""
    if _under_way:
        _under_way[-1].phase = name


def doing() -> str:
    """What this process is at, empty where nothing was told; for any thread."""
    return "; ".join(running.words() for running in [*_under_way])


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items, telling how many are done; ``total`` for those without a length."""
    count = len(items) if total is None and isinstance(items, Sized) else total
    with task(what, count) as running:
        for item in items:
            yield item
            running.advance()
