"""The command of the kernel benchmark: names, budget, devices that break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from task_cases import PEAK

from benchmarks.common.command import Budget, exit_code
from benchmarks.common.measure import Ceilings
from benchmarks.common.task import AUTO, Task
from benchmarks.kernels import run as kernels
from gisp.errors import GispError


@pytest.mark.parametrize("quick", [False, True])
def test_names_tell_tasks_apart(quick: bool) -> None:
    names = [task.name for task in kernels.all_tasks(quick)]
    assert len(set(names)) == len(names)
    ops = {task.op for task in kernels.all_tasks(quick)}
    assert {"wgrad_importance", "stacked_wgrad", "abs_weighted_reduce", "partition_step", "pack", "swiglu"} <= ops


def test_only_keeps_named_tasks() -> None:
    tasks = kernels.all_tasks()
    assert {task.op for task in kernels.chosen(tasks, ["swiglu"])} == {
        "swiglu",
        "swiglu_backward_",
        "swiglu_backward_gates_",
    }
    assert kernels.chosen(tasks, []) == tasks
    with pytest.raises(GispError, match=r"--only 'softmax' matches no benchmark.*rotary"):
        kernels.chosen(tasks, ["swiglu", "softmax"])


def test_a_spent_budget_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    budget = Budget(1000)
    out = tmp_path / "made" / "result.json"

    def one(task: Task, peak: Ceilings) -> list[dict[str, Any]]:
        budget.seconds = 0
        return [{"op": task.op, "implementation": AUTO, "median_ms": 1.0, "extra_bytes": 0}]

    for name, value in {
        "ceilings": lambda: PEAK,
        "run_task": one,
        "identity": lambda device: {"commit": "abc"},
        "require_gpu": lambda what: None,
        "Budget": lambda seconds: budget,
    }.items():
        monkeypatch.setattr(kernels, name, value)
    assert kernels.main(["--only", "swiglu", "--budget", "5", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    names = [task.name for task in kernels.chosen(kernels.all_tasks(), ["swiglu"])]
    assert len(result["rows"]) == 1 and result["left_out"] == names[1:] and result["identity"] == {"commit": "abc"}


def test_a_device_that_breaks_leaves_the_other_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(task: Task, peak: Ceilings) -> list[dict[str, Any]]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    for name, value in {
        "ceilings": lambda: PEAK,
        "run_task": broken,
        "identity": lambda device: {},
        "require_gpu": lambda what: None,
    }.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: broken(Task("x", {}), PEAK))
    out = tmp_path / "result.json"
    assert kernels.main(["--only", "rotary llama-2-13b", "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert {row["red"] for row in rows} == {"CUDA error: an illegal memory access was encountered"}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert exit_code(lambda: kernels.main(["--quick"])) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(GispError, match="needs a CUDA device"):
        kernels.main([])
