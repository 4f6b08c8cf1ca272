"""Implementations of gate gradients."""

from __future__ import annotations

import pytest
from task_cases import right_ones

from benchmarks.common.task import AUTO, checked
from benchmarks.kernels.tasks import gates


@pytest.mark.parametrize(("width", "block"), [(48, 1), (96, 32)])
def test_gate_gradients_are_right_and_a_wrong_one_is_not_timed(on_cpu: None, width: int, block: int) -> None:
    prepared = gates._prepare(3, width, block)
    assert right_ones(prepared) == [AUTO, "eager"]
    prepared.implementations = {"short": lambda x, g: gates.gate_grads_eager(x[:, 1:], g[:, 1:], block)}
    assert checked(prepared)[0] == {}
    assert len(gates.tasks(False)) == 16 and len(gates.tasks(True)) == 2
