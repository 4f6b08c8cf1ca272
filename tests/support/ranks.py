"""Several processes of one group, on a CPU over gloo, forked from a server that has the imports done."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

_PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "gisp.run.prune", "gisp.cli"]
_SECONDS = 60


@dataclass
class Ended:
    """How a process ended: its exit code, and all it wrote."""

    code: int | None
    text: str


def _child(
    rank: int, size: int, folder: str, address: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    target = os.open(f"{folder}/log-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.environ["GISP_CACHE"] = "off"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # A process that was stopped or ended leaves partners behind: none of them waits for the others here.
    os._exit(0)


def start_ranks(
    size: int, folder: Path, work: Callable[..., None], *arguments: Any, store: str = "file"
) -> list[BaseProcess]:
    """Run ``work(*arguments)`` in every process of a group of that size.

    Args:
        store: of the group: ``file``, or ``tcp`` for one that ends with the first process.
    """
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"file://{folder}/store" if store == "file" else f"tcp://127.0.0.1:{free.getsockname()[1]}"
    return _forked(_child, [(rank, size, str(folder), address, work, arguments) for rank in range(size)])


def _forked(target: Callable[..., None], given: Sequence[tuple[Any, ...]]) -> list[BaseProcess]:
    """A process for each of the arguments."""
    context = multiprocessing.get_context("forkserver")
    # The server finds modules by PYTHONPATH alone.
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        context.set_forkserver_preload(_PRELOADED)
        started: list[BaseProcess] = [context.Process(target=target, args=one) for one in given]
        for process in started:
            process.start()
    finally:
        os.environ["PYTHONPATH"] = before
    return started


def end_of(started: list[BaseProcess], folder: Path, ranks: list[int] | None = None) -> list[Ended]:
    """Wait for the processes, or for those of some ranks, after which the others are killed."""
    awaited = [started[rank] for rank in ranks] if ranks is not None else started
    for process in awaited:
        process.join(_SECONDS)
    for process in started:
        if process.is_alive() and process in awaited:
            texts = [path.read_text() for path in sorted(folder.glob("log-*"))]
            process.kill()
            pytest.fail(f"a process did not end within {_SECONDS} s: {texts}")
        process.kill()
        process.join()
    return [Ended(process.exitcode, (folder / f"log-{rank}").read_text()) for rank, process in enumerate(started)]


def run_ranks(size: int, folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    """The same to the end; every process must succeed."""
    for rank, ended in enumerate(end_of(start_ranks(size, folder, work, *arguments), folder)):
        assert ended.code == 0, f"rank {rank}: {ended.text}"


def _module(rank: int, folder: str, environment: dict[str, str], module: str, arguments: Sequence[str]) -> None:
    for stream, name in ((1, "out"), (2, "log")):
        os.dup2(os.open(f"{folder}/{name}-{rank}", os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def launch_forked(count: int, module: str, arguments: Sequence[str], again: str) -> int:
    """In place of :func:`gisp.replicas.launch.launch`: the same processes, which need not import everything first.

    They find the environment and the store that torchrun gives. How processes are started and ended has tests of its
    own, which start them as users do.
    """
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "forked",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GISP_CACHE": "off",
    }
    with tempfile.TemporaryDirectory() as folder:
        started = _forked(_module, [(rank, folder, environment, module, list(arguments)) for rank in range(count)])
        found = end_of(started, Path(folder))
        sys.stdout.flush()
        sys.stderr.flush()
        for rank, ended in enumerate(found):
            os.write(1, Path(folder, f"out-{rank}").read_bytes())
            os.write(2, ended.text.encode())
    return next((ended.code for ended in found if ended.code), 0)
