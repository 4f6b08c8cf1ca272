"""What a command says beside its result: progress and remarks on standard error, as much of it as is asked for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from rich.console import Console

from gisp.cli.flags import flag
from gisp.errors import GispError
from gisp.progress import reporting
from gisp.replicas.environment import rank

Command = TypeVar("Command", bound=Callable[..., None])
_FLAGS = (
    flag("quiet", "Print only the result.", kind=bool, names=("--quiet", "-q")),
    flag("verbose", "Print a line for every step, and remarks of the libraries.", kind=bool, names=("--verbose", "-v")),
)


# A file or pipe has no width to keep to.
_PIPE_WIDTH = 1000


def plain_console() -> Console:
    """Prints tables and lines of a result; names of files are no markup."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


class Output:
    """Where remarks go while a command runs.

    Attributes:
        quiet, verbose: what was asked for.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        self._display: Any = None

    def say(self, message: str) -> None:
        """One line, nothing where a quiet command is asked for."""
        if not self.quiet:
            self.warn(message)

    def warn(self, message: str) -> None:
        """One line in any case."""
        if self._display is not None:
            self._display.say(message)
        else:
            print(message, file=sys.stderr, flush=True)

    def run(self, command: Callable[..., None], *arguments: Any, **keywords: Any) -> None:
        """Run a command while its progress is shown."""
        if self.quiet:
            with reporting(False):
                command(*arguments, **keywords)
            return
        from gisp.progress.display import Bar, Lines

        with Bar() if sys.stderr.isatty() and not self.verbose else Lines(every=self.verbose) as display:
            self._display = display
            try:
                with reporting(display):
                    command(*arguments, **keywords)
            finally:
                self._display = None


_current = Output()


def output() -> Output:
    """That of the command which runs."""
    return _current


def shows_progress(command: Command) -> Command:
    """Give a command ``--quiet`` and ``--verbose``, and show its progress."""

    @wraps(command)
    def shown(*arguments: Any, quiet: bool | None = None, verbose: bool | None = None, **keywords: Any) -> None:
        global _current
        if quiet and verbose:
            raise GispError("--quiet and --verbose are both given: leave one out")
        # Of several processes of a run the first speaks.
        before, _current = _current, Output(bool(quiet) or rank() > 0, bool(verbose))
        try:
            _current.run(command, *arguments, **keywords)
        finally:
            _current = before

    signature = inspect.signature(command, eval_str=True)
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    shown.__signature__ = signature.replace(parameters=[*parameters, *_FLAGS])  # type: ignore[attr-defined]
    return shown  # type: ignore[return-value]
