"""Seconds of the phases of a step."""

from __future__ import annotations

import time

import pytest
import torch

from gisp.progress import doing, task
from gisp.run.metrics.measure import PHASES, PhaseClock


def test_phases_add_up_to_the_wall_time():
    clock = PhaseClock(torch.device("cpu"))
    for phase in PHASES[:2]:
        time.sleep(0.01)
        assert clock.mark(phase) == clock.seconds[phase] >= 0.01
    clock.settle()
    time.sleep(0.02)
    clock.mark("compact")
    assert clock.seconds["compact"] >= 0.02
    assert clock.total() == pytest.approx(sum(clock.seconds.values()))
    assert clock.total() >= 0.04
    assert clock.peak_bytes() is None


def test_the_phase_that_follows_is_told():
    with task("pruning", 2):
        clock = PhaseClock(torch.device("cpu"))
        seen = [doing()]
        for phase in PHASES[:-1]:
            clock.mark(phase)
            seen.append(doing())
    assert seen == [f"pruning, 0 of 2 done, {phase}" for phase in PHASES]
