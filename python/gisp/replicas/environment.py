"""What a launcher of ``torch.distributed`` says to its processes, by environment variables."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from gisp.errors import GispError, quoted
from gisp.replicas.errors import ReplicaError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# For processes to come together, and of collectives after that: one that works may take as long as it needs, dead and
# stuck ones are told by the watch.
_MEETING, _PATIENCE = timedelta(minutes=10), timedelta(days=7)
_ASKING = timedelta(seconds=5)
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
_VARIABLES = (*_NUMBERS, "MASTER_ADDR")
_UNSET = "start the processes by torchrun, or unset it"


def launched() -> bool:
    """Whether this process is one of several that a launcher started; one alone counts if torchrun started it."""
    if not all(os.environ.get(name) for name in _VARIABLES):
        return False
    return "TORCHELASTIC_RUN_ID" in os.environ or os.environ["WORLD_SIZE"] != "1"


def check_launched() -> None:
    """Refuse what no launcher says: processes that count themselves otherwise would wait for one another in vain.

    Raises:
        ReplicaError: names the variable. This process tells it, as others may have a sound one.
    """
    if not launched():
        return
    for name in _NUMBERS:
        value = os.environ[name]
        if not re.fullmatch("[0-9]{1,9}", value):
            raise ReplicaError(f"{name} is {quoted(value)} in the environment, no number: {_UNSET}", told=False)
    size, port = int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
    if rank() >= size:
        raise ReplicaError(f"RANK is {rank()} in the environment, of WORLD_SIZE {size}: {_UNSET}", told=False)
    if not 0 < port < 2**16:
        raise ReplicaError(f"MASTER_PORT is {port} in the environment, no port: {_UNSET}", told=False)


def rank() -> int:
    """Number of this process, 0 of one that no launcher started."""
    return int(os.environ["RANK"]) if launched() else 0


def processes_here() -> int:
    """Processes that a launcher started on this host."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() and os.environ.get("LOCAL_WORLD_SIZE") else 1


def first_to_refuse(message: str) -> bool:
    """Whether this process is the one to tell what several may refuse alike, before they watch over one another.

    The store of torchrun says who comes first. Without one the first process tells what all refuse.
    """
    if not launched() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return not rank()
    from torch import distributed

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = hashlib.sha256(f"{attempt} {message}".encode()).hexdigest()
    try:
        return distributed.TCPStore(*place, is_master=False, timeout=_ASKING).add(f"gisp/refused/{key}", 1) == 1
    except RuntimeError:
        return not rank()


def share_cores() -> None:
    """Give every process of this host its part of the cores, unless ``OMP_NUM_THREADS`` says how many threads it has.

    Each would take all of them, and threads that wait for one another would keep the others from starting kernels.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes_here()))


@contextmanager
def joined(device: str) -> Iterator[ProcessGroup | None]:
    """The group of the processes that a launcher started, ``None`` without one; every process gets a GPU of its own.

    Args:
        device: as of ``--device``.

    Raises:
        GispError: there is no GPU for this process, a device of one number for all, or others do not come.
    """
    if not launched():
        yield None
        return
    import torch
    from torch import distributed

    local = int(os.environ["LOCAL_RANK"])
    if device not in ("auto", "cuda", "cpu"):
        raise GispError(f"--device {device} is one for all processes: leave it out, each takes a GPU of its own")
    # Messages between stages wait for one another where streams share a queue of the GPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local >= torch.cuda.device_count():
            # Others have one, so this one tells.
            raise ReplicaError(
                f"process {local} of this host has no GPU: start as many as there are, {torch.cuda.device_count()}",
                told=False,
            )
        torch.cuda.set_device(local)
        share_cores()
    try:
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_MEETING)
        # The first collective makes the connections.
        distributed.all_reduce(torch.zeros(1, device="cuda" if on_gpu else "cpu"))
    except RuntimeError as error:
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise GispError(f"the processes of this run did not come together: {words}") from None
    distributed.distributed_c10d._set_pg_timeout(_PATIENCE)
    yield distributed.group.WORLD
    # Not after a failure: it would wait for those that are gone.
    distributed.destroy_process_group()
