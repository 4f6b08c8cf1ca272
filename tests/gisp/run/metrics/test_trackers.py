"""Figures of steps in TensorBoard's own files, and through the documented calls of wandb and Trackio."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gisp
from gisp.cli import main
from gisp.errors import GispError
from gisp.run.metrics.trackers import check_log, figures


def _prune(model_folder: Path, token_file: Path, out: Path, *more: str) -> int:
    options = ["--preset", "paper", "--steps", "2", "--sparsity", "0.2", "--device", "cpu", "--dtype", "float32", "-q"]
    return main(["prune", str(model_folder), "--data", str(token_file), "--out", str(out), *options, *more])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_steps_go_through_the_calls_of_the_library(name, model_folder, token_file, tmp_path, monkeypatch):
    calls: list[tuple[str, Any]] = []
    library: Any = ModuleType(name)
    library.__spec__ = importlib.machinery.ModuleSpec(name, None)
    library.init = lambda *, project, name: calls.append(("init", (project, name)))
    library.log = lambda data, *, step: calls.append(("log", (data, step)))
    library.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, name, library)
    assert _prune(model_folder, token_file, tmp_path / "run", "--log", name) == 0
    steps = gisp.Trajectory.load(tmp_path / "run").steps
    assert calls == [
        ("init", ("gisp", "run")),
        *(("log", (figures(record), record.step)) for record in steps),
        ("finish", None),
    ]
    assert _prune(model_folder, token_file, tmp_path / "plain") == 0
    files = [(tmp_path / run / "trajectory.safetensors").read_bytes() for run in ("run", "plain")]
    assert files[0] == files[1]


def test_tensorboard_reads_what_was_written(model_folder, token_file, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert _prune(model_folder, token_file, tmp_path / "run", "--log", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("loss", "sparsity"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(s.step, getattr(s, name)) for s in gisp.Trajectory.load(tmp_path / "run").steps]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)
    # A run goes on beside its logs.
    assert _prune(model_folder, token_file, tmp_path / "run", "--resume", "--log", "tensorboard") == 0


def test_a_library_that_is_not_there_is_named(monkeypatch, model_folder, token_file, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GispError, match=r"--log wandb needs wandb: pip install 'gisp\[wandb\]'"):
        check_log("wandb")
    monkeypatch.undo()
    assert _prune(model_folder, token_file, tmp_path / "run", "--log", "paper") == 2
    assert "--log is 'paper': choose one of tensorboard, wandb, trackio" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
