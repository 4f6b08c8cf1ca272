"""The quality study end to end on a tiny decoder: every way runs, results go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality.__main__ import main

STEPS = 4


@pytest.fixture
def arguments(files: Path, tmp_path: Path) -> list[str]:
    made = [str(files / "model"), "--calibration", str(files / "calibration.safetensors")]
    made += ["--evaluation", str(files / "evaluation.safetensors"), "--out", str(tmp_path / "R.json")]
    return [
        *made,
        "--device",
        "cpu",
        "--steps",
        str(STEPS),
        "--exact-tokens",
        "416",
        "--exact-steps",
        "5",
        "--sparsities",
        "0.25,0.3",
    ]


def test_every_way_runs_and_a_second_call_adds_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        *arguments,
        "--seeds",
        "1",
        "--study",
        "criteria",
        "--study",
        "compensation",
        "--study",
        "task",
        "--plot",
    ]
    assert main(options) == 0
    result = json.loads((tmp_path / "R.json").read_text())
    assert {cell["name"] for cell in result["cells"] if cell["study"] == "criteria"} >= {
        "fast",
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
        assert [point["asked"] for point in cell["points"] if point["compensation"] is None] == [0.25, 0.3], cell
        assert len(cell["points"]) == 2 * (1 + len(cell["compensate"]))
        assert all(point["perplexity"] > 1 for point in cell["points"])
    assert (tmp_path / "R-criteria.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "30 %: fast is number" in printed and "30 %: accuracy on continuations: lm on text, second-order" in printed
    assert main(options) == 0
    again = json.loads((tmp_path / "R.json").read_text())
    assert again["cells"] == result["cells"]
