"""Implementations of scores, and other tile configurations."""

from __future__ import annotations

import pytest
from task_cases import right_ones

from benchmarks.common.registry import Case
from benchmarks.common.task import AUTO
from benchmarks.kernels import importance, sweep


@pytest.mark.parametrize("axis", ["row", "column"])
def test_importance_implementations_agree(on_cpu: None, axis: str) -> None:
    case = Case("small", "x", 24, 32, axis, 4, 1.0)
    assert right_ones(importance._prepare_wgrad(case, 20)) == [AUTO, "triton", "cublas + ours", "cublas + eager"]
    assert right_ones(importance._prepare_reduction(case)) == [AUTO, "eager"]
    if axis == "row":
        assert right_ones(importance._prepare_stacked(case, 3, 20)) == [AUTO, "one by one", "cublas + eager"]


def test_sweep_covers_the_usual_configuration_once(on_cpu: None) -> None:
    prepared = sweep._prepare(Case("small", "x", 24, 32, "row", 4, 1.0), 20)
    assert prepared.baseline in prepared.implementations and len(prepared.implementations) > 10
    prepared.check(prepared.implementations[prepared.baseline])
