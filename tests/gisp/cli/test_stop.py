"""Signals that end a command."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from gisp.cli.stop import unwinding

NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def listens() -> Iterator[None]:
    """What a shell starts in its background has SIGINT ignored, and a command then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class _Dropped:
    """Receives a signal as it goes, as an object that is just being finalised does."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def _in_finaliser(number: int) -> None:
    _Dropped(number)


def _in_callback(number: int) -> None:
    class Thing:
        pass

    thing = Thing()
    watched = weakref.ref(thing, lambda _: signal.raise_signal(number))
    del thing
    assert watched() is None


@pytest.mark.parametrize("place", [_in_finaliser, _in_callback])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_that_python_drops_ends_the_command_all_the_same(
    number: int, place: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: seen.append(told.exc_type.__name__))
    waiting = threading.Event()
    with unwinding() as stop:
        with pytest.raises(KeyboardInterrupt):
            place(number)
            # Python has dropped the first one by now.
            waiting.wait(60)
        assert stop.code == 128 + number
    assert not seen


def test_other_errors_of_finalisers_are_told_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("broken")

    seen: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: seen.append(str(told.exc_value)))
    before = sys.unraisablehook
    with unwinding():
        Broken()
    assert seen == ["broken"] and sys.unraisablehook is before


def test_an_interrupt_while_the_command_line_is_imported_is_no_traceback() -> None:
    code = """
import signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from gisp.cli import main
sys.exit(main(["--version"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
