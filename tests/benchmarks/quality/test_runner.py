"""Cells of the study differ in what their names say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.quality.cells import Cell, Sizes, criteria_cells, fast_cells, task_cells
from benchmarks.quality.runner import Bench, Runner
from gisp.config.criteria import CRITERIA

STEPS = 4


def bench_in(files: Path) -> Bench:
    tokens = ((str(files / "calibration.safetensors"),), (str(files / "evaluation.safetensors"),))
    return Bench(str(files / "model"), *tokens, (0.3,), (104,))


def test_the_parts_of_fast_change_what_they_name(files: Path) -> None:
    bench = bench_in(files)
    runner = Runner(bench)
    found = {}
    named = ("as it is", "8 steps", "2,048 tokens a step", "align 1", "exact, 1 steps")
    made = [cell for cell in fast_cells(range(1), Sizes(steps=STEPS, exact_tokens=416)) if cell.name in named]
    assert len(made) == len(named)
    for cell in made:
        result = runner.run(cell)
        assert "error" not in result, result
        found[cell.name] = result["points"][0]
    assert found["8 steps"]["tokens"] == 2 * found["as it is"]["tokens"]
    assert found["2,048 tokens a step"]["perplexity"] == found["as it is"]["perplexity"]  # the set is smaller
    assert found["align 1"]["perplexity"] != found["as it is"]["perplexity"]


def test_a_distilled_cell_differs_from_the_plain_one(files: Path) -> None:
    runner = Runner(bench_in(files))
    plain, distilled = (
        runner.run(cell)["points"][0]["perplexity"]
        for cell in fast_cells(range(1), Sizes(steps=STEPS, exact_tokens=416))
        if cell.name in ("as it is", "distillation loss")
    )
    assert plain != distilled


def test_every_registered_criterion_has_a_cell_and_one_of_a_single_step_a_run_for_each_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered = {**CRITERIA, "trained": dataclasses.replace(CRITERIA["gisp"], options={"steps": 1})}
    monkeypatch.setattr("benchmarks.quality.cells.CRITERIA", registered)
    cells = criteria_cells(range(2), Sizes())
    assert {cell.options.get("criterion") for cell in cells} >= set(registered)
    assert {cell.mode for cell in cells if cell.name == "trained"} == {"each size"}
    assert [cell.seed for cell in cells if cell.name == "magnitude"] == [0]
    assert len({cell.key for cell in cells}) == len(cells)


def test_a_run_for_each_size_is_what_a_run_to_that_size_finds(files: Path) -> None:
    runner = Runner(dataclasses.replace(bench_in(files), sparsities=(0.2, 0.3)))
    options = {"steps": 2, "batch_tokens": 104, "seed": 0}
    each = runner.run(Cell("criteria", "x", options, mode="each size"))["points"]
    alone = Runner(bench_in(files)).run(Cell("criteria", "x", options))["points"]
    assert [point["asked"] for point in each] == [0.2, 0.3]
    assert each[1]["perplexity"] == alone[0]["perplexity"] and each[1]["tokens"] == alone[0]["tokens"]


def test_task_cells_see_equal_tokens_of_what_is_there() -> None:
    assert [cell.data for cell in task_cells(range(1), Sizes())] == [("text",)]
    cells = task_cells(range(1), Sizes(tasks=("piqa", "gsm8k", "boolq")))
    assert {cell.data for cell in cells} == {
        ("text",),
        ("piqa",),
        ("piqa", "text"),
        ("gsm8k",),
        ("gsm8k", "text"),
    }
    assert len({(cell.options["steps"], cell.options["batch_tokens"]) for cell in cells}) == 1
