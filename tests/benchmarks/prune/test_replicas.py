"""A tiny run shared by two processes, beside one process with and without slices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gisp.cli import main


def test_shared_runs_are_timed_and_are_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    asked = ["bench", "prune", "--model", "tiny", "--device", "cpu", "--steps", "3"]
    assert main([*asked, "--gpus", "1,2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    runs = json.loads(out.read_text())["replicas"]
    assert [(run["gpus"], run["slices"]) for run in runs] == [(1, None), (1, 8), (2, 8)]
    assert all(run["steps"] == 3 and run["step_seconds_dense"] > 0 for run in runs)
    assert runs[1]["removed_sha256"] == runs[2]["removed_sha256"]
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith("tiny ")] == ["-", "true", "true"]
    assert main(["bench", "prune", "--from", str(out)]) == 0
    assert "times faster" in capsys.readouterr().out


@pytest.mark.parametrize("counts", ["0", "two", "1,99"])
def test_numbers_of_gpus_are_checked(counts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prune", "--model", "tiny", "--device", "cpu", "--gpus", counts]) == 2
    assert counts in capsys.readouterr().err
