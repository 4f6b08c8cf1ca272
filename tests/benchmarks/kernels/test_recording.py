"""Implementations of recording a pass."""

from __future__ import annotations

import torch
from task_cases import right_ones

from benchmarks.common.task import AUTO, checked
from benchmarks.kernels.tasks import recording


def test_recorders_are_right_and_a_wrong_one_is_not_timed(on_cpu: None) -> None:
    prepared = recording._prepare(48, 32, 64)
    assert right_ones(prepared) == [AUTO, recording.KEPT_GRAD, "eager"]
    for part in prepared.parts.values():
        part(*prepared.inputs)
    prepared.implementations = {"rows twice": lambda grad, x: torch.ones(48 + 32)}
    assert checked(prepared)[0] == {}
    assert len(recording.tasks(True)) == 2
