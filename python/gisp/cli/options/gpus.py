"""``--gpus``: a command that several processes share, started anew as so many or already one of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer

from gisp.cli.flags import flag
from gisp.cli.stop import InterruptError
from gisp.errors import GispError
from gisp.replicas.environment import joined, launched, rank

if TYPE_CHECKING:
    from gisp.replicas.group import Replicas

GPUS = flag("gpus", "GPUs of this host that share the work; their number does not change the result.", kind=int, min=1)

STAGES = flag(
    "stages",
    "Stages that the layers of a run are split into, each in a process on one GPU.",
    kind=int,
    min=1,
)


def start_processes(context: typer.Context, gpus: int | None, device: str) -> None:
    """Run the command as so many processes of this host, and end with their exit code; one process goes on.

    Raises:
        GispError: there are fewer GPUs, or torchrun has started processes.
        typer.Exit: they have done it.
    """
    if gpus is None or (gpus == 1 and not launched()):
        return
    check_not_started(gpus)
    run_as_processes(context, gpus, device, again="give the command again")


def check_not_started(gpus: int) -> None:
    """Refuse to start processes from one that torchrun has started.

    Raises:
        GispError: it has.
    """
    if launched():
        raise GispError(f"--gpus {gpus} starts processes, torchrun has started them already: leave it out")


def run_as_processes(context: typer.Context, count: int, device: str, again: str) -> NoReturn:
    """Run the command anew as processes of this host, without ``--gpus``, and end with their exit code.

    Args:
        context: of the command, which holds its arguments.
        again: what to do after a signal has ended a process.

    Raises:
        GispError: there are fewer GPUs, or a signal ended a process.
        typer.Exit: they have done it.
    """
    from gisp.replicas.launch import check_processes, launch

    check_processes(count, device)
    try:
        code = launch(count, "gisp", _without_gpus(context.obj), again)
    except KeyboardInterrupt:
        # The first process tells.
        raise InterruptError("") from None
    raise typer.Exit(code)


@contextmanager
def processes(gpus: int | None, device: str) -> Iterator[Replicas | None]:
    """The processes a launcher started, or the one of ``--gpus 1``; ``None`` without either."""
    if not launched() and gpus is None:
        yield None
        return
    from gisp.replicas.group import Replicas

    with joined(device) as group, warnings.catch_warnings():
        if rank():
            warnings.simplefilter("ignore", UserWarning)
        yield Replicas(group)


def _without_gpus(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    given = iter(arguments)
    for argument in given:
        if argument == "--":
            return [*kept, argument, *given]
        if argument == "--gpus":
            next(given, None)
        elif not argument.startswith("--gpus="):
            kept.append(argument)
    return kept
