"""The ``gisp`` command line: argument parsing, one-line errors and exit codes; the work is done elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import runpy
import sys
from pathlib import Path
from socket import gethostname
from typing import Annotated, Any

import typer

from gisp.cli.bench_command import bench
from gisp.cli.demo_command import demo
from gisp.cli.eval_command import evaluate
from gisp.cli.export_command import export
from gisp.cli.flags import with_bare_values
from gisp.cli.inspect_command import inspect, report
from gisp.cli.prune_command import prune
from gisp.cli.stop import INTERRUPTED, InterruptError, unwinding
from gisp.config.options import OPTIONS
from gisp.errors import GispError, is_out_of_memory, quoted, shortened
from gisp.replicas.environment import check_launched, first_to_refuse, launched, rank
from gisp.replicas.errors import ReplicaError

app = typer.Typer(
    name="gisp",
    help="Structured pruning of decoder LLMs: one run, every size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (prune, export, report, inspect, demo):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(bench)

_LONGEST_LINE = 1000
_EMPTY = re.compile(r"--[a-z-]+=")
# transformers imports torchao where it is installed; complaints about its binaries must not bury an error's one line.
_NOISY = ("torchao", "torch.utils._pytree")
_NOTHING_LEFT = "nothing half-written is left, give the command again"
_OUT_OF_MEMORY = (
    "out of memory: give a smaller --batch-size, --batch-tokens or --calibration-tokens, or --dtype bfloat16"
)
# Typer's own parsing errors, whichever click it is built on.
_ParseError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _version() -> str:
    """The version file's, without the package around it, which imports torch."""
    package = importlib.util.find_spec("gisp_kernels")
    folder = Path(str(package.origin)).parent if package else Path()
    return str(runpy.run_path(str(folder / "_version.py"))["__version__"])


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gisp {_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of ``gisp`` itself."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Returns:
        0, 2 for bad input (one line on stderr), 130 for Ctrl-C, 143 for TERM, 129 for HUP.
    """
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if launched():
        # Read when torch is imported: where processes lose one another it prints C++ frames around the one line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with unwinding() as stop:
        try:
            return _run(argv)
        except InterruptError as interrupted:
            # A terminal that hung up takes no line.
            with contextlib.suppress(OSError):
                if not rank() and str(interrupted):
                    print(f"interrupted: {interrupted}", file=sys.stderr)
            return stop.code


def _run(argv: list[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["prune"]:
        arguments = with_bare_values(arguments, OPTIONS.values())
    try:
        _check_texts(arguments)
        check_launched()
        # Commands that start processes give them their own arguments.
        code = app(args=arguments, standalone_mode=False, obj=[*arguments])
    except ReplicaError as error:
        return 2 if error.told else _fail(str(error), always=True)
    except GispError as error:
        return _fail(str(error))
    except _ParseError as error:
        message = _with_value(error, arguments)
        # Without a command the help has been shown, and there is nothing more to say.
        return _fail(message) if message.strip() else 2
    except typer.Exit as exit_request:
        code = exit_request.exit_code
    except (KeyboardInterrupt, typer.Abort):
        raise InterruptError(_NOTHING_LEFT) from None
    except InterruptError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(_OUT_OF_MEMORY)
        if isinstance(error, OSError):
            return _fail(f"{error.strerror or error}: {error.filename or 'file'}")
        raise
    if code == INTERRUPTED:
        raise InterruptError(_NOTHING_LEFT)
    return int(code or 0)


def _check_texts(arguments: list[str]) -> None:
    """Refuse an option given an empty text, which as a path is the working folder.

    Raises:
        GispError: names what stands before it.
    """
    for before, argument in zip(["gisp", *arguments], arguments, strict=False):
        option = argument[:-1] if _EMPTY.fullmatch(argument) else before if argument == "" else None
        if option is not None:
            raise GispError(f"an empty text follows {option}: give a value, a variable of the shell may be unset")


def _with_value(error: Any, argv: list[str]) -> str:
    """A parsing error's message, with the value the user gave where the message leaves it out."""
    message = str(error.format_message())
    for option in getattr(getattr(error, "param", None), "opts", ()):
        # The last one counts when an option is given twice.
        for given, following in reversed(list(zip(argv, [*argv[1:], ""], strict=True))):
            value = following if given == option else given.removeprefix(f"{option}=")
            if given.startswith(option) and value not in message:
                return f"{message}: {option} is {quoted(value)}"
    if message.startswith(("Got unexpected extra argument", "No such ")):
        # Of which command the help tells, where one is known.
        known = [name for name in argv[:1] if not name.startswith("-") and "command" not in message]
        return f"{message.rstrip('.')}: {' '.join(['gisp', *known, '--help'])} tells what there is"
    return message


def _fail(message: str, *, always: bool = False) -> int:
    """One line; what several processes of a run refuse alike one of them tells."""
    if always or first_to_refuse(message):
        line = shortened(" ".join(message.split()), _LONGEST_LINE)
        # Only others than the first may have their own reasons, such as a file that one host lacks.
        where = "" if always or not rank() else f"rank {rank()} on {gethostname()}: "
        print(f"error: {where}{line}", file=sys.stderr)
    return 2
