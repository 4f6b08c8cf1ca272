"""Cells side by side in several processes on one or several GPUs: small models leave most of a GPU unused."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from benchmarks.common.command import Budget
from benchmarks.quality.cells import Cell
from benchmarks.quality.runner import Bench, Runner
from gisp.errors import GispError

Result = dict[str, Any]
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# How often a process that died is replaced; a study whose every process dies has another fault.
_REPLACEMENTS = 20


def run_cells(
    bench: Bench,
    cells: Sequence[Cell],
    *,
    jobs: int = 1,
    gpus: int = 1,
    budget: Budget,
    on_result: Callable[[Result], None],
) -> list[Cell]:
    """Run cells, each whole in one process, in the order given.

    A single process is this one: it begins no cell once the budget is spent. Others are stopped then, and a cell whose
    process dies has that as its error.

    Args:
        jobs: processes of each GPU.
        gpus: GPUs taken, the first ones.
        on_result: called with every finished cell's result, in this process.

    Returns:
        Cells left out.

    Raises:
        GispError: more GPUs than there are, or a bench that cannot be read.
    """
    waiting = list(cells)
    if not waiting:
        return []
    if jobs * gpus == 1:
        runner = Runner(bench)
        while waiting and not budget.over:
            on_result(runner.run(waiting.pop(0)))
        return waiting
    places = [place for _ in range(jobs) for place in devices(gpus)][: len(waiting)]
    threads = max(1, (os.cpu_count() or 1) // len(places))
    return _Pool(bench, places, threads).run(waiting, budget, on_result)


def devices(gpus: int) -> list[str | None]:
    """What ``CUDA_VISIBLE_DEVICES`` is for processes of each GPU; ``None`` leaves it.

    Raises:
        GispError: fewer GPUs than that.
    """
    if gpus == 1:
        return [None]
    visible = os.environ.get(_VISIBLE)
    found = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if len(found) < gpus:
        raise GispError(f"--gpus is {gpus}: there are {len(found)}")
    return list(found[:gpus])


class _Worker:
    """A process that runs one cell after another, and the cell it has now."""

    def __init__(self, bench: Bench, place: str | None, threads: int) -> None:
        self.place = place
        self.cell: Cell | None = None
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(bench, theirs, threads), daemon=True)
        with _visible(place):
            self.process.start()
        # Theirs alone keeps the pipe open: it ends when the process does.
        theirs.close()

    def send(self, cell: Cell) -> None:
        self.cell = cell
        self.pipe.send(cell)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class _Pool:
    def __init__(self, bench: Bench, places: Sequence[str | None], threads: int) -> None:
        self._bench, self._threads = bench, threads
        self._left = _REPLACEMENTS
        self._workers = [_Worker(bench, place, threads) for place in places]

    def run(self, waiting: list[Cell], budget: Budget, on_result: Callable[[Result], None]) -> list[Cell]:
        try:
            while not budget.over:
                for worker in self._workers:
                    if worker.cell is None and waiting:
                        worker.send(waiting.pop(0))
                busy = {worker.pipe: worker for worker in self._workers if worker.cell is not None}
                if not busy:
                    break
                for pipe in wait(list(busy), timeout=0.5):
                    on_result(self._received(busy[pipe]))  # type: ignore[index]
            return [worker.cell for worker in self._workers if worker.cell is not None] + waiting
        finally:
            for worker in self._workers:
                worker.stop()

    def _received(self, worker: _Worker) -> Result:
        """The result of a worker's cell; a worker that died is replaced."""
        cell, worker.cell = worker.cell, None
        assert cell is not None
        try:
            result: Result | str = worker.pipe.recv()
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode
            if self._left == 0:
                raise GispError(f"processes of the study die again and again, the last one with code {code}") from None
            self._left -= 1
            self._workers[self._workers.index(worker)] = _Worker(self._bench, worker.place, self._threads)
            worker.stop()
            return {**cell.to_dict(), "error": f"its process ended with code {code}"}
        if isinstance(result, str):
            raise GispError(result)
        return result


def _serve(bench: Bench, pipe: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        runner = Runner(bench)
    except GispError as error:
        pipe.send(str(error))
        return
    # The pipe ends when the process that began this one is gone.
    with suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(runner.run(pipe.recv()))


@contextmanager
def _visible(place: str | None) -> Iterator[None]:
    before = os.environ.get(_VISIBLE)
    if place is not None:
        os.environ[_VISIBLE] = place
    try:
        yield
    finally:
        if place is not None:
            os.environ.pop(_VISIBLE)
            if before is not None:
                os.environ[_VISIBLE] = before
