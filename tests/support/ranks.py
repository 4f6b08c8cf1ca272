"""Several processes of one group, on a CPU over gloo, forked from a server that has the imports done."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
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
    context = multiprocessing.get_context("forkserver")
    # The server finds modules by PYTHONPATH alone.
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        context.set_forkserver_preload(_PRELOADED)
        started: list[BaseProcess] = []
        for rank in range(size):
            given = (rank, size, str(folder), address, work, arguments)
            started.append(context.Process(target=_child, args=given))
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
