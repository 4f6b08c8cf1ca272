"""Cells side by side in several processes: small models leave most of a GPU, and of its time, unused."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common.command import Budget
from benchmarks.quality.cells import Cell
from benchmarks.quality.runner import Bench, Runner

Result = dict[str, Any]
_runner: Runner | None = None


def run_cells(
    bench: Bench, cells: Sequence[Cell], jobs: int, budget: Budget, on_result: Callable[[Result], None]
) -> list[Cell]:
    """Run cells in ``jobs`` processes, each cell whole; none begins once the budget is spent.

    Args:
        on_result: called with every finished cell's result, in this process.

    Returns:
        Cells left out.
    """
    waiting = list(cells)
    if jobs == 1:
        runner = Runner(bench)
        while waiting and not budget.over:
            on_result(runner.run(waiting.pop(0)))
        return waiting
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=_start, initargs=(bench, jobs)) as pool:
        running: list[Any] = []
        while running or (waiting and not budget.over):
            while waiting and len(running) < jobs and not budget.over:
                running.append(pool.apply_async(_run, (waiting.pop(0),)))
            done = [item for item in running if item.ready()]
            running = [item for item in running if not item.ready()]
            for item in done:
                on_result(item.get())
            if not done and running:
                running[0].wait(0.05)
    return waiting


def _start(bench: Bench, jobs: int) -> None:
    global _runner
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    _runner = Runner(bench)


def _run(cell: Cell) -> Result:
    assert _runner is not None
    return _runner.run(cell)
