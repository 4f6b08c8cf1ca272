"""Checks before timing, and the rows of what was timed."""

from __future__ import annotations

import torch
from task_cases import PEAK

from benchmarks.common.task import (
    AUTO,
    Prepared,
    Task,
    describe,
    rates,
    run_task,
    with_speedups,
)
from benchmarks.kernels.tasks import importance
from gisp_kernels.testing import reduce_truth


def test_wrong_implementations_are_reported_and_not_timed(on_cpu: None) -> None:
    weight, grad = torch.randn(24, 32), torch.randn(24, 32)
    truth = reduce_truth(weight, grad, "column", 4)
    timed = []

    def breaks(w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nat line 3")

    prepared = Prepared(
        inputs=(weight, grad),
        implementations={
            AUTO: lambda w, g: importance.reduce_eager(w, g, "column", 4),
            "half": lambda w, g: importance.reduce_eager(w, g, "column", 4) / 2,
            "broken": breaks,
        },
        check=importance.within_budget((weight, grad), truth.scores.float(), truth),
        baseline="half",
        bytes=1e9,
        parts={"part": lambda w, g: timed.append(w)},
    )
    rows = {row["implementation"]: row for row in run_task(Task("op", {"model": "m"}, lambda: prepared), PEAK)}
    assert "relative error" in rows["half"]["red"] and "median_ms" not in rows["half"]
    assert rows["broken"]["red"] == "no such kernel"
    assert rows[AUTO]["gbs"] == 500.0 and rows[AUTO]["percent_of_copy"] == 12.5
    assert "speedup" not in rows[AUTO], "its baseline was not timed"
    assert not timed, "parts compute something else and are not checked"
    assert "WRONG, not timed: no such kernel" in describe(rows["broken"])


def test_rows_hold_rates_and_speedups() -> None:
    rows = with_speedups(
        [
            {"implementation": AUTO, "median_ms": 2.0, **rates(8e11, 0, 2.0, PEAK)},
            {"implementation": "eager", "median_ms": 5.0},
            {"implementation": "bad", "red": "wrong"},
        ],
        "eager",
    )
    assert rows[0]["speedup"] == 2.5 and rows[1]["speedup"] == 1.0 and "speedup" not in rows[2]
    assert rows[0]["tflops"] == 400.0 and rows[0]["percent_of_matmul"] == 50.0
    line = describe({"op": "swiglu", "model": "m", "rows": 24, "width": 32, "extra_bytes": 2**20, **rows[0]})
    assert "24 x 32" in line and "2.0000 ms" in line and "50.0 % of matmul" in line and "2.50x" in line
    assert "1.0 MiB" in line
