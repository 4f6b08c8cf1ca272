"""A step is written exactly once, at once or when the next one has been started; what a step fetches."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.run.step import StepWriter, Transfer
from gisp.run.trajectory import Trajectory


def test_a_write_runs_at_once_unless_it_may_wait():
    done: list[int] = []
    writer = StepWriter(overlap=False)
    writer.take(lambda: done.append(1))
    assert done == [1] and writer.held_up > 0
    writer.flush()
    assert done == [1]


def test_a_write_kept_back_runs_once_at_the_flush():
    done: list[int] = []
    writer = StepWriter(overlap=True)
    writer.take(lambda: done.append(1))
    assert done == [] and writer.held_up == 0
    writer.flush()
    writer.flush()
    assert done == [1]


def test_a_failed_write_is_not_tried_again():
    def fail() -> None:
        raise OSError("disk")

    writer = StepWriter(overlap=True)
    writer.take(fail)
    with pytest.raises(OSError, match="disk"):
        writer.flush()
    writer.flush()


def run(out, monkeypatch, overlap: bool, stop_after: int | None = None):
    monkeypatch.setattr("gisp.run.loop.StepWriter", lambda **_: StepWriter(overlap))

    def on_step(record, steps):
        if record.step == stop_after:
            raise KeyboardInterrupt

    options: dict[str, Any] = {
        "sparsity": 0.4,
        "steps": 6,
        "align": 4,
        "batch_tokens": 64,
        "dtype": "float32",
        "device": "cpu",
    }
    return gisp.prune(tiny_model(), tiny_tokens(), out=out, on_step=on_step, resume=out.exists(), **options)


def test_overlapped_writes_leave_the_same_run_and_lose_no_finished_step(tmp_path, monkeypatch):
    plain, late = tmp_path / "plain", tmp_path / "late"
    run(plain, monkeypatch, overlap=False)
    with pytest.raises(KeyboardInterrupt):
        run(late, monkeypatch, overlap=True, stop_after=3)
    assert len(Trajectory.load(late).steps) == 3
    run(late, monkeypatch, overlap=True)
    name = "trajectory.safetensors"
    assert (late / name).read_bytes() == (plain / name).read_bytes()
    steps = [json.loads(line)["step"] for line in (late / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))


def test_a_cpu_fetch_returns_what_it_was_given():
    tensors = [torch.arange(3), torch.tensor(2.0)]
    assert [t.tolist() for t in Transfer(torch.device("cpu")).fetch(tensors)] == [[0, 1, 2], 2.0]
