"""Steps of a run on a GPU are written beside it."""

from __future__ import annotations

from typing import Any

import pytest
from slow_disk import Held, counted
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.run import trajectory
from gisp.run.trajectory import Trajectory

pytestmark = pytest.mark.gpu
OPTIONS: dict[str, Any] = {"sparsity": 0.4, "steps": 8, "align": 4, "batch_tokens": 64, "device": "cuda"}


def test_a_disk_slower_than_the_steps_gets_fewer_writes_and_the_same_run(tmp_path, monkeypatch):
    gisp.prune(tiny_model().cuda(), tiny_tokens(), out=tmp_path / "plain", **OPTIONS)
    disk = Held("trajectory.json", 5)
    records: list[int] = []
    monkeypatch.setattr(trajectory, "write_atomic", disk.write)
    monkeypatch.setattr(Trajectory, "save", counted(Trajectory.save, records))
    gisp.prune(tiny_model().cuda(), tiny_tokens(), out=tmp_path / "slow", on_step=disk.on_step, **OPTIONS)
    # Nothing was written while the first write was held, and the run did not wait for it.
    assert records[0] == 1 and records[1] > 5 and records[-1] == 8
    for name in ("trajectory.safetensors", "state/step-00008.safetensors"):
        assert (tmp_path / "slow" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
