"""Ends asked for from outside: Ctrl-C, and TERM and HUP, which unwind a command as Ctrl-C does."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_UNWOUND = ("SIGTERM", "SIGHUP")
# Exit code that shells give a process ended by Ctrl-C, and that newer versions of typer make of a KeyboardInterrupt.
INTERRUPTED = 128 + signal.SIGINT
# Seconds until an interrupt that was lost is raised again.
_AGAIN = 0.01


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
        self._unraisable = sys.unraisablehook

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
        self._listen()
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._lost

    def give_back(self) -> None:
        """Let the signals end the process at once again."""
        sys.unraisablehook = self._unraisable
        for number in self._taken:
            signal.signal(number, signal.SIG_DFL)

    def _listen(self) -> None:
        for number in self._taken:
            signal.signal(number, self._receive)

    def _lost(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Raise an interrupt again that came while an object was finalised: Python drops what is raised there."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._unraisable(unraisable)
            return
        self._listen()
        threading.Timer(_AGAIN, _interrupt, (self.number,)).start()


def _interrupt(number: int) -> None:
    """Send the main thread a signal, which where threads can be sent one ends what it waits for."""
    send = getattr(signal, "pthread_kill", None)
    if send is None:
        _thread.interrupt_main(signal.Signals(number))
    else:
        send(threading.main_thread().ident, number)


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
