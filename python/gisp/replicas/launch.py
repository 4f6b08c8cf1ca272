"""Starts a command as several processes of this host, by the launcher of ``torch.distributed``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence

from gisp.errors import GispError

# Exit codes of a command that has said why, or of Python where it shows a traceback.
# By name: Windows has no SIGHUP.
_TELLING = {1, 2, *(128 + number for number in signal.Signals if number.name in ("SIGHUP", "SIGINT", "SIGTERM"))}
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
        KeyboardInterrupt: Ctrl-C, which a terminal sends to all of them.
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
            elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        # What ended by itself has told why; a signal may have ended another one for that reason.
        codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode in _TELLING]
        if codes:
            return int(codes[0])
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            how = f"ended with exit code {failure.exitcode} and without a word"
        else:
            name = signal.Signals(-failure.exitcode).name
            how = f"was ended by {name}{_CAUSES.get(name, '')}"
        raise GispError(f"rank {rank} (process {failure.pid}) {how}, so the others were too: {again}") from None
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + int(stopped.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0
