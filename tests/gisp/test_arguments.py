"""What Python callers and shells give by mistake is named before any work, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.cli import main
from gisp.compensation.options import make_options
from gisp.data import read_rows
from gisp.errors import GispError
from gisp.evaluate import EvalOptions, LmEvalTasks
from gisp.export.run import export_nested_run
from gisp.target import evaluate_along

PRUNE: dict[str, Any] = {"sparsity": 0.2, "steps": 1, "align": 1, "protect_first": 0, "batch_tokens": 64}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"out": ""}, "out is '': give a path"),
        ({"out": 5}, "out is 5: give a path"),
        ({"out": b"run"}, "out is b'run': give a path"),
        ({"model": ""}, "model is '': give a model folder"),
        ({"on_step": 5}, "on_step is 5: give a function"),
        ({"progress": "yes"}, "progress is 'yes': give true, false or a function"),
        ({"data": tiny_tokens().to_sparse()}, "no dense tensor with numbers in memory"),
        ({"data": tiny_tokens().to("meta")}, "no dense tensor with numbers in memory"),
        ({"data": torch.nested.nested_tensor([torch.arange(3), torch.arange(4)])}, "no dense tensor with numbers"),
    ],
)
def test_prune(given: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GispError, match=line):
        gisp.prune(**{"model": tiny_model(), "data": tiny_tokens(), **PRUNE, **given})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"run": 5}, "run is 5: give a path"),
        ({"out": None}, "out is None: give a path"),
        ({"out": ""}, "out is '': give a path"),
        ({"data": 5}, "data is 5: give a path"),
        ({"format": ["hf"]}, r"format \['hf'\] is not available"),
        ({"sizes": {"round_mlp": 8}}, "sizes is .*: give a SizeOptions"),
        ({"compensation": "lsq"}, "compensation is 'lsq': give a CompensationRequest"),
        ({"window": 8.0, "data": Path("data.txt")}, "--window is 8.0: give at least 2"),
    ],
)
def test_export_run(given: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(GispError, match=line):
        gisp.export_run(**{"run": tmp_path / "run", "sparsity": None, "out": tmp_path / "out", **given})
    assert not list(tmp_path.iterdir())


def test_export_model(tmp_path: Path) -> None:
    model = tiny_model()
    gisp.prune(model, tiny_tokens(), **PRUNE)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"out": ""}, "out is '': give a path"),
        ({"tokenizer_from": tmp_path / "absent"}, "tokenizer_from .*absent is not a folder"),
        ({"tokenizer_from": ""}, "tokenizer_from is '': give a path"),
        ({"format": None}, "format None needs a run folder"),
    )
    for given, line in cases:
        with pytest.raises(GispError, match=line):
            gisp.export_model(model, **{"out": tmp_path / "out", **given})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"target": 5}, "target is 5: give a path"),
        ({"data": 5}, "data is 5: give a path"),
        ({"options": {"window": 8}}, "options is .*: give EvalOptions"),
        ({"sparsities": 0.2}, "sparsities is 0.2: give a list of numbers"),
        ({"sparsities": "0.2,0.3"}, "sparsities is '0.2,0.3': give a list of numbers"),
    ],
)
def test_evaluations(given: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(GispError, match=line):
        evaluate_along(**{"target": tmp_path, "data": "data.txt", "sparsities": [0.2], **given})


def test_one_text_is_not_several() -> None:
    """Its letters would be."""
    pytest.importorskip("lm_eval")
    with pytest.raises(GispError, match="until is 'Question:': give a tuple of texts"):
        EvalOptions(generate=True, until="Question:")  # type: ignore[arg-type]
    with pytest.raises(GispError, match="names is 'piqa': give a tuple of texts"):
        LmEvalTasks("piqa")  # type: ignore[arg-type]
    with pytest.raises(GispError, match=r"--limit is 0\.5: give at least 1"):
        LmEvalTasks(("piqa",), limit=0.5)  # type: ignore[arg-type]
    assert EvalOptions(generate=True, until=["a"]).until == ("a",)  # type: ignore[arg-type]


def test_sizes_of_a_nested_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(GispError, match=r"sparsities is 0\.2: give a list of numbers"):
        export_nested_run(tmp_path / "run", tmp_path / "out", sparsities=0.2)  # type: ignore[arg-type]


def test_rows_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert list(read_rows(tmp_path / "rows.jsonl")) == [{"text": "a"}]
    with pytest.raises(GispError, match="data is 5: give a path"):
        list(read_rows(5))  # type: ignore[arg-type]


def test_trajectories() -> None:
    trajectory = gisp.prune(tiny_model(), tiny_tokens(), **PRUNE)
    for value in ("", None, 5):
        for call in (gisp.Trajectory.load, trajectory.save):
            with pytest.raises(GispError, match=r"folder is .*: give a path"):
                call(value)  # type: ignore[arg-type]
    # One holds tensors, which have no truth value.
    assert trajectory == trajectory and len({trajectory}) == 1


def test_scalars_of_numpy_and_torch_are_numbers() -> None:
    assert make_options(method="lsq", damping=np.float32(0.5), tokens=torch.tensor(64)) == make_options(
        method="lsq", damping=0.5, tokens=64
    )


@pytest.mark.parametrize(
    ("command", "before"),
    [
        (["prune", "", "--data", "x", "--out", "y"], "prune"),
        (["prune", "model", "--data", "x", "--out", ""], "--out"),
        (["export", "run", "--sparsity", "0.2", "--out="], "--out"),
        (["report", ""], "report"),
    ],
)
def test_empty_texts(
    command: list[str], before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"error: an empty text follows {before}: give a value, a variable of the shell may be unset\n"
    )
    assert not list(tmp_path.iterdir())
