"""A caller's ``torch.set_default_device`` moves nothing of ours: new tensors lie where each of them is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.data import load_sequences
from gisp.errors import GispError
from gisp.export.run import export_nested_run

PRUNE: dict[str, Any] = {"sparsity": 0.3, "steps": 2, "align": 1, "protect_first": 0, "batch_tokens": 64}


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Nothing can be read of what lies on ``meta``, as of what lies on another GPU."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("criterion", ["second-order", "gisp", "random", "flap", "learned-gates"])
def test_runs_are_the_same(criterion: str, token_file: Path, model_folder: Path, elsewhere: None) -> None:
    options: dict[str, Any] = {**PRUNE, "criterion": criterion, "dtype": "float32"}
    if criterion == "learned-gates":
        options["gate_steps"] = 3
    found = gisp.prune(model_folder, str(token_file), **options)
    torch.set_default_device(None)
    expected = gisp.prune(model_folder, str(token_file), **options)
    assert all(torch.equal(at, expected.removed_at[name]) for name, at in found.removed_at.items())


def test_everything_after_a_run_works(token_file: Path, model_folder: Path, tmp_path: Path, elsewhere: None) -> None:
    run, data = tmp_path / "run", str(token_file)
    trajectory = gisp.prune(model_folder, data, out=run, dtype="float32", **PRUNE)
    model = trajectory.model
    assert model is not None
    gisp.compensate(model, data, tokens=64)
    assert gisp.Trajectory.load(run).at(0.1).device.type == "cpu"
    trajectory.at(0.3, model)
    gisp.export_model(model, tmp_path / "memory")
    gisp.export_run(run, 0.3, tmp_path / "export", data=token_file)
    export_nested_run(run, tmp_path / "nested")
    gisp.load(tmp_path / "nested").resize(0.1)
    assert gisp.fuse(gisp.load(tmp_path / "export")).device.type == "cpu"


def test_sequences_are_held_against_the_vocabulary(token_file: Path) -> None:
    model = tiny_model()
    gisp.prune(model, tiny_tokens(), **PRUNE)
    foreign = load_sequences(torch.full((8, 16), 1000), vocab_size=2000, seq_len=None)
    with pytest.raises(GispError, match="below the vocabulary"):
        gisp.compensate(model, foreign)
