"""What takes time says how far it is, from Python and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gisp
from gisp.cli import main
from gisp.progress import Progress, reporting
from gisp.target import evaluate_target

OPTIONS: dict[str, Any] = {"preset": "paper", "steps": 3, "sparsity": 0.3, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model_folder, token_file) -> Path:
    out = tmp_path_factory.mktemp("heard") / "run"
    gisp.prune(model_folder, token_file, out=out, **OPTIONS)
    return out


def _ends(heard: list[Progress]) -> dict[str, tuple[int, int | None]]:
    return {p.what: (p.done, p.total) for p in heard if p.ended}


def test_pruning_and_compensation_tell_how_far_they_are(model_folder, token_file):
    heard: list[Progress] = []
    trajectory = gisp.prune(model_folder, token_file, progress=heard.append, **OPTIONS)
    assert _ends(heard)["pruning"] == (3, 3) and f"loading {Path(model_folder).name}" in _ends(heard)
    (last,) = [p for p in heard if p.what == "pruning" and p.done == 3 and not p.ended]
    assert last.details[0] == f"sparsity {trajectory.steps[-1].sparsity:.4f}" and last.left == 0
    heard.clear()
    assert trajectory.model is not None
    gisp.compensate(trajectory.model, str(token_file), progress=heard.append)
    ends = _ends(heard)
    assert ends and all(done == total for done, total in ends.values())


def test_evaluation_and_export_tell_how_far_they_are(run_folder, token_file, tmp_path):
    heard: list[Progress] = []
    with reporting(heard.append):
        evaluate_target(str(run_folder), str(token_file), device="cpu")
        found = _ends(heard)["evaluating"]
        assert found[0] == found[1] and found[0]
        heard.clear()
        gisp.export_run(run_folder, 0.3, tmp_path / "export", device="cpu")
    assert any("logits" in what for what in _ends(heard))


def test_nothing_is_said_unless_wanted(model_folder, token_file, tmp_path, capfd):
    places = [str(model_folder), "--data", str(token_file), "--preset", "paper", "--steps", "3", "--sparsity", "0.3"]
    place = ["--device", "cpu", "--dtype", "float32", "--out"]
    gisp.prune(model_folder, token_file, progress=False, **OPTIONS)
    assert main(["prune", *places, *place, str(tmp_path / "quiet"), "--quiet"]) == 0
    captured = capfd.readouterr()
    assert captured.out == "" and "pruning" not in captured.err and "gisp" not in captured.err
    assert main(["prune", *places, *place, str(tmp_path / "verbose"), "--verbose"]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("pruning ")] == [
        *(f"pruning {step}/3" for step in (1, 2, 3))
    ]
    assert main(["prune", *places, *place, str(tmp_path / "both"), "-q", "-v"]) == 2
    assert "--quiet and --verbose are both given" in capfd.readouterr().err


def test_a_margin_says_what_its_loss_is():
    from gisp.run.metrics.measure import step_details
    from gisp.run.trajectory import StepRecord

    record = StepRecord(1, 0.1, 0.1, 0.1, 1, 1, 1, -14.07, 100, 2.0, 8)
    assert step_details(record, "margin")[1] == "right minus wrong NLL -14.0700"
    assert step_details(record, "lm")[1:] == ("loss -14.0700", "50 tokens/s")
