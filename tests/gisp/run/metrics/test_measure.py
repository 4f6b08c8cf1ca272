"""Seconds of the phases of a step."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch

from gisp.progress import doing, task
from gisp.run.metrics import measure
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


def test_events_of_a_gpu_serve_step_after_step(monkeypatch):
    clock_of_gpu, made = itertools.count(), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            made.append(self)
            self.at = -1

        def record(self, stream: Any) -> None:
            self.at = next(clock_of_gpu)

        def elapsed_time(self, end: Event) -> float:
            return 1000.0 * (end.at - self.at)

    monkeypatch.setattr(measure, "_free", {})
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("reset_peak_memory_stats", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    for _ in range(3):
        clock = PhaseClock(torch.device("cuda"))
        for phase in PHASES[:2]:
            assert clock.mark(phase) == 0
        clock.settle()
        assert [clock.seconds[phase] for phase in PHASES[:2]] == [1, 1]
    assert len(made) == 3
