"""The ``gisp`` command line: argument parsing, one-line errors and exit codes; the work is done elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer

from gisp.cli.bench_command import bench
from gisp.cli.demo_command import demo
from gisp.cli.eval_command import evaluate
from gisp.cli.prune_command import prune
from gisp.cli.run_commands import export, inspect, report
from gisp.errors import GispError

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

INTERRUPTED = 130
# transformers imports torchao where it is installed; complaints about its binaries must not bury an error's one line.
_NOISY = ("torchao", "torch.utils._pytree")
# Typer's own parsing errors, whichever click it is built on.
_ParseError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _print_version(wanted: bool) -> None:
    if wanted:
        from gisp_kernels import __version__

        print(f"gisp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of ``gisp`` itself."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input (one line on stderr), 130 for Ctrl-C."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        code = app(args=argv, standalone_mode=False)
    except GispError as error:
        return _fail(str(error))
    except _ParseError as error:
        message = _with_value(error, sys.argv[1:] if argv is None else argv)
        # Without a command the help has been shown, and there is nothing more to say.
        return _fail(message) if message.strip() else 2
    except typer.Exit as exit_request:
        code = exit_request.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or 'file'}")
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return _fail(
            "out of memory: give a smaller --batch-size, --batch-tokens or --calibration-tokens, or --dtype bfloat16"
        )
    # Newer versions of typer make this code of a KeyboardInterrupt.
    return _interrupted() if code == INTERRUPTED else int(code or 0)


def _interrupted() -> int:
    print("interrupted: finished steps of a run are kept, continue them with --resume", file=sys.stderr)
    return INTERRUPTED


def _with_value(error: Any, argv: list[str]) -> str:
    """A parsing error's message, with the value the user gave where the message leaves it out."""
    message = str(error.format_message())
    for option in getattr(getattr(error, "param", None), "opts", ()):
        # The last one counts when an option is given twice.
        for given, following in reversed(list(zip(argv, [*argv[1:], ""], strict=True))):
            value = following if given == option else given.removeprefix(f"{option}=")
            if given.startswith(option) and value not in message:
                return f"{message}: {option} is {value!r}"
    return message


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
