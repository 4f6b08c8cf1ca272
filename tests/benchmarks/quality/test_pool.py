"""Cells in several processes: all of them end up as results, those whose process dies too."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.command import Budget
from benchmarks.quality import pool
from benchmarks.quality.cells import DENSE, Cell
from benchmarks.quality.pool import devices, run_cells
from benchmarks.quality.runner import Bench, Runner
from gisp.errors import GispError

WAY = {"steps": 2, "batch_tokens": 104, "seed": 0}


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are forked, which takes no imports and keeps what a test has changed."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: _Forked())


def bench_of(files: Path, **changes: Any) -> Bench:
    options = {"sparsities": (0.25,), "windows": (104,), **changes}
    return Bench(
        str(files / "model"),
        (str(files / "calibration.safetensors"),),
        (str(files / "evaluation.safetensors"),),
        **options,
    )


def test_processes_find_what_one_finds_and_failures_are_results(files: Path) -> None:
    cells = [DENSE, Cell("criteria", "good", WAY), Cell("criteria", "bad", {**WAY, "steps": -1})]
    found: dict[int, list[dict[str, Any]]] = {}
    for jobs in (1, 2):
        found[jobs] = []
        left = run_cells(bench_of(files), cells, jobs=jobs, budget=Budget(None), on_result=found[jobs].append)
        assert left == []
    dense, good, bad = (
        [next(cell for cell in found[jobs] if cell["name"] == name) for jobs in (1, 2)]
        for name in ("dense", "good", "bad")
    )
    assert dense[0]["perplexity"] == dense[1]["perplexity"]
    assert good[0]["points"][0]["perplexity"] == good[1]["points"][0]["perplexity"] > 1
    assert "steps" in bad[0]["error"] and bad[0]["error"] == bad[1]["error"]


def test_a_spent_budget_leaves_cells(files: Path) -> None:
    budget = Budget(1e-9)
    for jobs in (1, 2):
        assert run_cells(bench_of(files), [DENSE] * 3, jobs=jobs, budget=budget, on_result=print) == [DENSE] * 3


@pytest.mark.usefixtures("forked")
def test_a_bench_that_cannot_be_read_ends_the_study(files: Path) -> None:
    broken = bench_of(files, tasks=files / "none.json")
    for jobs in (1, 2):
        with pytest.raises(GispError, match=r"none\.json holds no prepared tasks"):
            run_cells(broken, [DENSE, DENSE], jobs=jobs, budget=Budget(None), on_result=print)


@pytest.mark.usefixtures("forked")
def test_a_cell_whose_process_dies_is_a_failure(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a runner that dies on one cell."""
    monkeypatch.setattr(pool, "Runner", _Mortal)
    cells = [Cell("criteria", name, {}) for name in ("a", "deadly", "b", "c")]
    found: list[dict[str, Any]] = []
    assert run_cells(bench_of(files), cells, jobs=2, budget=Budget(None), on_result=found.append) == []
    assert {cell["name"]: cell.get("error") for cell in found} == {
        "a": None,
        "b": None,
        "c": None,
        "deadly": "its process ended with code 7",
    }


class _Forked:
    def __init__(self) -> None:
        from multiprocessing.context import ForkContext

        self._context = ForkContext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class _Mortal(Runner):
    def __init__(self, bench: Bench) -> None:
        pass

    def run(self, cell: Cell) -> dict[str, Any]:
        if cell.name == "deadly":
            os._exit(7)
        return cell.to_dict()


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    assert devices(1) == [None] and devices(2) == ["3", "5"]
    with pytest.raises(GispError, match="--gpus is 4: there are 3"):
        devices(4)
