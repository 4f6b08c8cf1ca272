"""Who hears of progress: a bar, lines, a callable of the user's, or no one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gisp.errors import GispError, quoted
from gisp.progress.track import Progress, Report, heard_by


@contextmanager
def reporting(progress: bool | Report | None) -> Iterator[None]:
    """Who hears of what goes on inside.

    Args:
        progress: ``None``: whoever hears it already, else a bar on a terminal; ``True``: a bar on a terminal, a line
            now and then elsewhere; ``False``: no one; or a callable that takes a :class:`Progress`.
    """
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise GispError(f"progress is {quoted(progress)}: give true, false or a function of a Progress")
    if progress is None and (heard_by.get() is not None or not sys.stderr.isatty()):
        yield
        return
    if progress is None or progress is True:
        from gisp.progress.display import Bar, Lines

        with Bar() if sys.stderr.isatty() else Lines() as display, _heard(display):
            yield
        return
    with _heard(None if progress is False else progress):
        yield


@contextmanager
def _heard(report: Report | None) -> Iterator[None]:
    token = heard_by.set(report or _no_one)
    try:
        yield
    finally:
        heard_by.reset(token)


def _no_one(_: Progress) -> None:
    """Hears it all and says nothing; what runs inside sees that someone has decided."""
