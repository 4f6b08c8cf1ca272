"""Ends asked for from outside: Ctrl-C, and TERM and HUP, which unwind a command as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_UNWOUND = ("SIGTERM", "SIGHUP")


class InterruptError(Exception):
    """A command was interrupted; the message is what the user is told, empty where a process of it has told."""


class Stop:
    """Which signal ended a command.

    Attributes:
        number: of TERM or HUP, else of INT.
    """

    def __init__(self) -> None:
        self.number: int = signal.SIGINT
        self._taken = [number for number in _unwound() if signal.getsignal(number) is signal.SIG_DFL]

    @property
    def code(self) -> int:
        """The exit code that shells give a process ended by the signal."""
        return 128 + self.number

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.number = number
        # A supervisor may send several; a second one must not cut the cleaning up.
        for taken in self._taken:
            signal.signal(taken, signal.SIG_IGN)
        raise KeyboardInterrupt

    def take(self) -> None:
        """Receive what nothing else handles or ignores (as nohup does)."""
        for number in self._taken:
            signal.signal(number, self._receive)

    def give_back(self) -> None:
        """Let the signals end the process at once again."""
        for number in self._taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def unwinding() -> Iterator[Stop]:
    """Make TERM and HUP raise KeyboardInterrupt in the block, unless they are ignored (nohup) or handled already."""
    stop = Stop()
    stop.take()
    try:
        yield stop
    finally:
        stop.give_back()


def _unwound() -> list[int]:
    """Numbers of the signals, none where this thread cannot receive any."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in signal.Signals if number.name in _UNWOUND]
