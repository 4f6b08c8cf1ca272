"""A tiny model split over two processes, beside one that is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.registry import MODELS
from benchmarks.prune.stages import build_part
from gisp.cli import main


@pytest.mark.usefixtures("forked_launch")
def test_a_split_run_is_timed_and_is_the_run_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "prune", "--model", "tiny", "--device", "cpu", "--steps", "3"]
    found = []
    for stages in (1, 2):
        out = tmp_path / f"{stages}.json"
        assert main([*asked, "--stages", str(stages), "--out", str(out)]) == 0
        found += json.loads(out.read_text())["stages"]
    one, two = found
    assert one["trajectory_sha256"] == two["trajectory_sha256"]
    assert one["scheduled_idle_share"] == 0 < two["scheduled_idle_share"] < 0.5
    assert two["gpus"] == len(two["ranks"]) == 2 and 0 < two["waiting_share"] < 1
    assert sum(rank["weight_bytes"] for rank in two["ranks"]) == one["ranks"][0]["weight_bytes"]
    assert "tiny, 2 stages on 2" in capsys.readouterr().out
    assert main(["bench", "prune", "--from", str(tmp_path / "2.json")]) == 0


def test_values_of_a_part_are_those_of_the_whole() -> None:
    whole, _ = build_part(MODELS["tiny"], 1, 0, torch.device("cpu"))
    parts = [build_part(MODELS["tiny"], 2, stage, torch.device("cpu"))[0] for stage in range(2)]
    for name, parameter in whole.named_parameters():
        held = [part.get_parameter(name) for part in parts if not part.get_parameter(name).is_meta]
        assert len(held) == 1 and torch.equal(held[0], parameter), name
    assert any(parameter.is_meta for parameter in parts[0].parameters())


@pytest.mark.parametrize(
    ("stages", "gpus", "words"),
    [
        ("2", "3", "--stages 2 does not divide 3 processes evenly: give --gpus 2 or 4"),
        ("2", "2,4", "--gpus is 2,4: runs in stages take one number"),
        ("8", "8", "--stages 8 is more than the 4 layers of this model"),
    ],
)
def test_what_cannot_be_split_starts_nothing(
    stages: str, gpus: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> int:
        raise AssertionError("started")

    monkeypatch.setattr("benchmarks.prune.stages.launch", never)
    assert main(["bench", "prune", "--model", "tiny", "--device", "cpu", "--stages", stages, "--gpus", gpus]) == 2
    assert words in capsys.readouterr().err
