"""A tiny run shared by two processes, beside one process with and without slices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.prune import replicas
from gisp.cli import main


@pytest.mark.usefixtures("forked_launch")
def test_shared_runs_are_timed_and_are_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    asked = ["bench", "prune", "--model", "tiny", "--device", "cpu", "--steps", "3"]
    assert main([*asked, "--gpus", "1,2", "--slices", "4", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    runs = json.loads(out.read_text())["replicas"]
    assert [(run["gpus"], run["slices"]) for run in runs] == [(1, None), (1, 4), (2, 4)]
    assert all(run["steps"] == 3 and run["step_seconds_dense"] > 0 for run in runs)
    assert [run.get("same") for run in runs] == [None, True, True]
    assert runs[0]["trajectory_sha256"] != runs[1]["trajectory_sha256"] == runs[2]["trajectory_sha256"]
    assert [len(run["cards"]) for run in runs] == [1, 1, 2]
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith("tiny ")] == ["-", "true", "true"]
    assert main(["bench", "prune", "--from", str(out)]) == 0
    assert "times faster" in capsys.readouterr().out
    # One that is another run is seen, and fails the command.
    runs[2]["same"] = False
    out.write_text(json.dumps({"benchmark": "prune", "runs": [], "replicas": runs}))
    assert main(["bench", "prune", "--from", str(out)]) == 1
    assert "false" in capsys.readouterr().out


@pytest.mark.usefixtures("forked_launch")
def test_what_was_run_is_kept_when_a_later_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    known = replicas.launch
    monkeypatch.setattr(replicas, "launch", lambda n, *given, **again: 2 if n == 2 else known(n, *given, **again))
    asked = ["bench", "prune", "--model", "tiny", "--device", "cpu", "--steps", "2"]
    assert main([*asked, "--gpus", "1,2", "--out", str(out)]) == 2
    assert "on 2 GPUs ended with exit code 2" in capsys.readouterr().err
    assert len(json.loads(out.read_text())["replicas"]) == 2


@pytest.mark.parametrize("given", [("--budget", "9"), ("--criterion", "gisp"), ("--goals",)], ids=str)
def test_what_shared_runs_do_not_follow_is_refused(given: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prune", "--model", "tiny", "--device", "cpu", "--gpus", "2", *given]) == 2
    assert f"{given[0]} does not go with --gpus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("counts", "words"), [("0", "'0': give"), ("two", "'two' is no list"), ("1,99", "--slices 4 is less than 99 GPUs")]
)
def test_numbers_of_gpus_are_checked(counts: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prune", "--model", "tiny", "--device", "cpu", "--gpus", counts]) == 2
    assert words in capsys.readouterr().err
