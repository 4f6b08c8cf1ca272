"""Implementations of scores, and other tile configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest
from task_cases import right_ones

from benchmarks.common.registry import MODELS, Case
from benchmarks.common.task import AUTO
from benchmarks.kernels import sweep
from benchmarks.kernels.tasks import importance


@pytest.mark.parametrize("axis", ["row", "column"])
def test_importance_implementations_agree(on_cpu: None, axis: str) -> None:
    case = Case("small", "x", 24, 32, axis, 4, 1.0)
    assert right_ones(importance._prepare_wgrad(case, 20)) == [AUTO, "triton", "cublas + ours", "cublas + eager"]
    assert right_ones(importance._prepare_reduction(case)) == [AUTO, "eager"]
    if axis == "row":
        assert right_ones(importance._prepare_stacked(case, 3, 20)) == [AUTO, "one by one", "cublas + eager"]


@pytest.mark.parametrize("name", ["tiny", "llama-2-13b"])
def test_a_layer_at_once_and_one_by_one_agree(on_cpu: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    small = replace(MODELS[name], hidden=32, head_dim=4, channels=48)
    monkeypatch.setitem(MODELS, name, small)
    prepared = importance._prepare_layer(name, 1.0)
    assert right_ones(prepared) == [AUTO, "one by one", "eager"]
    heads = small.heads * 4
    matrices = 2 if small.shares_kv else 4
    assert len(prepared.inputs) == 2 * (matrices + 3)
    assert prepared.bytes == 4 * 2 * (matrices * heads + 3 * 48) * 32
    assert prepared.implementations[AUTO](*prepared.inputs).shape == (small.heads + 48,)


def test_sweep_covers_the_usual_configuration_once(on_cpu: None) -> None:
    prepared = sweep._prepare(Case("small", "x", 24, 32, "row", 4, 1.0), 20)
    assert prepared.baseline in prepared.implementations and len(prepared.implementations) > 10
    prepared.check(prepared.implementations[prepared.baseline])
