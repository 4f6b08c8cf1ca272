"""The quality study end to end on a tiny decoder: every way runs, results go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality.__main__ import main
from gisp.errors import GispError

STEPS = 4


@pytest.fixture
def arguments(files: Path, tmp_path: Path) -> list[str]:
    made = [str(files / "model"), "--calibration", str(files / "calibration.safetensors")]
    made += ["--evaluation", str(files / "evaluation.safetensors"), "--out", str(tmp_path / "R.json")]
    return [
        *made,
        *("--device", "cpu", "--window", "104", "--steps", str(STEPS), "--batch-tokens", "208"),
        *("--exact-tokens", "208", "--exact-steps", "5", "--sparsities", "0.25,0.3", "--gate-steps", "40"),
    ]


def test_every_way_runs_and_a_second_call_adds_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*arguments, "--seeds", "1", "--study", "criteria", "--compensate", "none", "--plot"]
    assert main(options) == 0
    result = json.loads((tmp_path / "R.json").read_text())
    assert {cell["name"] for cell in result["cells"]} >= {
        "fast",
        "fast, gqa group",
        "paper, 5 steps",
        "official, 5 steps",
        "wanda-sp",
        "flap",
        "owl",
        "block-influence",
        "random",
        "magnitude",
        "signed",
        "taylor-local",
    }
    for cell in result["cells"]:
        assert [point["asked"] for point in cell["points"]] == [0.25, 0.3], cell
        assert all(point["perplexity"] > 1 for point in cell["points"])
    assert (tmp_path / "R-criteria.png").stat().st_size > 5000
    assert "30 %: fast is number" in capsys.readouterr().out
    assert main(options) == 0
    again = json.loads((tmp_path / "R.json").read_text())
    assert again["cells"] == result["cells"]


def test_tasks_are_calibrated_and_measured_on_different_rows(
    arguments: list[str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["--tasks", str(files / "tasks.json.xz"), "--task-rows", "4", "--generated-rows", "1"]
    assert main([*arguments, *tasks, "--seeds", "1", "--study", "task", "--sparsities", "0.3"]) == 0
    result = json.loads((tmp_path / "R.json").read_text())
    dense = result["dense"]
    assert result["setting"]["halves"] is True
    assert dense["chance piqa"] == pytest.approx(1 / 3) and dense["chance gsm8k"] == 0
    assert {name for name in dense if name.startswith("acc ")} == {"acc piqa", "acc piqa stderr", "acc gsm8k"}
    data = {cell["name"]: cell["data"] for cell in result["cells"]}
    assert data["margin, and text"] == ["piqa", "text"] and data["lm on solutions"] == ["gsm8k"]
    assert all(0 <= point["acc piqa"] <= 1 for cell in result["cells"] for point in cell["points"])
    assert "task: acc gsm8k" in capsys.readouterr().out


def test_compensations_of_the_command_line_replace_the_studys_own(arguments: list[str], tmp_path: Path) -> None:
    more = ["--only", "fast/0", "--compensate", "none", "--compensate", "lsq:tokens=208,target=local"]
    assert main([*arguments, *more]) == 0
    (cell,) = json.loads((tmp_path / "R.json").read_text())["cells"]
    wanted = {"method": "lsq", "tokens": 208, "target": "local"}
    assert [point["compensation"] for point in cell["points"]] == [None, wanted] * 2
    assert cell["points"][1]["compensation_tokens"] <= 208


def test_a_result_of_another_setting_is_not_gone_on_with(arguments: list[str], tmp_path: Path) -> None:
    setting = {"model": "another"}
    (tmp_path / "R.json").write_text(json.dumps({"benchmark": "quality", "setting": setting, "cells": [], "dense": {}}))
    with pytest.raises(GispError, match="was made with"):
        main(arguments)
    assert json.loads((tmp_path / "R.json").read_text())["setting"] == setting


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--study", "task"], "--study task needs tasks"),
        (["--compensate", "lsq:nothing=1"], "unknown option nothing"),
        (["--compensate", "magic"], "magic"),
        (["--only", "nothing"], "matches no way"),
    ],
)
def test_impossible_requests_are_refused(arguments: list[str], tmp_path: Path, change: list[str], message: str) -> None:
    with pytest.raises(GispError, match=message):
        main([*arguments, *change])
