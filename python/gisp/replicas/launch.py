"""Starts a command as several processes of this host, by the launcher of ``torch.distributed``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from gisp.errors import GispError
from gisp.replicas.siblings import children

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Exit codes of a command that has said why, or of Python where it shows a traceback; and of one that a signal unwound.
# By name: Windows has no SIGHUP.
_TELLING = {1, 2}
_UNWOUND = {128 + number for number in signal.Signals if number.name in ("SIGHUP", "SIGTERM")}
# What sends a signal that nobody sent by hand.
_CAUSES = {
    "SIGKILL": " (Linux does that where the memory of the host runs out)",
    "SIGABRT": " (NCCL does that where a collective waits for minutes)",
}


def check_processes(count: int, device: str) -> None:
    """Refuse more processes than GPUs.

    Args:
        device: as of ``--device``.

    Raises:
        GispError: there are fewer GPUs, or a device of one number is given.
    """
    import torch

    if device not in ("auto", "cuda", "cpu"):
        raise GispError(f"--gpus {count} gives every process a GPU of its own: leave --device {device} out")
    there = torch.cuda.device_count()
    if device != "cpu" and count > there:
        raise GispError(f"--gpus is {count}, {there} CUDA devices are here: give at most that many, or --device cpu")


def launch(count: int, module: str, arguments: Sequence[str], again: str) -> int:
    """Run ``python -m module arguments`` as ``count`` processes and wait for their end.

    A process that fails ends the others. It has told why, or it is told here.

    Args:
        again: what to do where a process has ended without a word.

    Returns:
        The exit code of the command.

    Raises:
        GispError: a process ended without a word.
        KeyboardInterrupt: Ctrl-C, in the terminal or of one process.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # As the command itself, processes import nothing from the folder they are started in.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            with _stopped_together():
                elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        return _code_of(error, again)
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + int(stopped.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _code_of(error: ChildFailedError, again: str) -> int:
    """The exit code of a command whose processes have failed; what it raises as :func:`launch`."""
    # What refuses or fails has told why, whatever ended before it.
    codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode in _TELLING]
    if codes:
        return int(codes[0])
    # Those that follow the first were ended by the launcher for it.
    rank, failure = error.get_first_failure()
    if failure.exitcode == 128 + signal.SIGINT:
        raise KeyboardInterrupt from None
    if failure.exitcode in _UNWOUND:
        return int(failure.exitcode)
    if failure.exitcode >= 0:
        how = f"ended with exit code {failure.exitcode} and without a word"
    else:
        name = signal.Signals(-failure.exitcode).name
        how = f"was ended by {name}{_CAUSES.get(name, '')}"
    raise GispError(f"rank {rank} (process {failure.pid}) {how}, so the others were too: {again}") from None


@contextmanager
def _stopped_together() -> Iterator[None]:
    """Let Ctrl-Z stop the processes as well, and what continues this one continue them.

    The launcher gives each a session of its own, which a terminal does not reach. They would go on, lose the store that
    lives here, and end.
    """

    def stop(_: int, __: FrameType | None) -> None:
        started = children()
        _signal(started, signal.SIGSTOP)
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            # Also where a signal that ends this one has come meanwhile: one that is stopped does not hear of it.
            _signal(started, signal.SIGCONT)

    # Windows has no such signal, and only the first thread may handle one.
    able = hasattr(signal, "SIGTSTP") and threading.current_thread() is threading.main_thread()
    ours = able and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)


def _signal(processes: Sequence[int], number: int) -> None:
    """Send a signal to processes and all that they have started in their sessions."""
    for process in processes:
        with suppress(ProcessLookupError):
            if os.getpgid(process) == process:
                os.killpg(process, number)
            else:
                os.kill(process, number)
