"""Runs of several processes: what they write is what one process writes, also where it is taken up by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from question_cases import letters
from ranks import run_ranks
from run_cases import OPTIONS, cut_after
from run_files import written
from tiny import tiny_model, tiny_tokens
from torch import distributed

import gisp
from gisp.data import Sequences
from gisp.score import gradient

# Batches that do not fall into slices evenly, of sequences of many lengths.
CASES: dict[str, dict[str, Any]] = {
    "stream": {"batch_tokens": 170},
    "exact": {"engine": "exact", "batch_tokens": None, "batch_size": 2, "first_order": "plain"},
    "few": {"batch_tokens": 40, "ema": 0.5},
    "regrow": {"batch_tokens": 170, "regrow": 1, "steps": 3},
    "owl": {"batch_tokens": 170, "allocator": "owl"},
    "choice": {"objective": "choice", "batch_tokens": 60},
    "flap": {"batch_tokens": 170, "criterion": "flap", "first_order": "plain"},
    "wanda-sp": {"batch_tokens": 40, "criterion": "wanda-sp", "first_order": "plain"},
    "autograd": {"batch_tokens": 170},
}


def texts() -> Sequences:
    tokens = tiny_tokens(24, 16)
    return Sequences.plain([(row[: 5 + i % 11], row[: 5 + i % 11]) for i, row in enumerate(tokens)])


def prune(out: str, case: str, **more: Any) -> gisp.Trajectory:
    data = letters() if case == "choice" else texts()
    options = {**OPTIONS, **CASES[case], **more}
    return gisp.prune(tiny_model("llama-gqa"), data, out=out, **options)


def prune_all(folder: str) -> None:
    """Every case, in the processes of one group."""
    known = gradient.why_not
    for case in CASES:
        gradient.why_not = (lambda *_: "a test says so") if case == "autograd" else known
        prune(f"{folder}/{case}", case, process_group=distributed.group.WORLD)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one process that has been given as many slices."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        for case in CASES:
            if case == "autograd":
                patch.setattr(gradient, "why_not", lambda *_: "a test says so")
            prune(str(folder / case), case, slices=4)
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_processes_changes_nothing(size: int, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    run_ranks(size, tmp_path / "ranks", prune_all, str(folder))
    for case in CASES:
        assert written(folder / case) == written(alone / case), case


def cut_run(out: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(out, "stream", process_group=distributed.group.WORLD, on_step=cut_after(2))


def resumed_run(out: str) -> None:
    trajectory = prune(out, "stream", process_group=distributed.group.WORLD, resume=True)
    assert len(trajectory.steps) == OPTIONS["steps"]


def test_another_number_of_processes_takes_a_run_up(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_ranks(2, tmp_path / "two", cut_run, str(out))
    assert len(gisp.Trajectory.load(out).steps) == 2
    run_ranks(3, tmp_path / "three", resumed_run, str(out))
    assert written(out) == written(alone / "stream")
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        prune(str(other), "stream", slices=4, on_step=cut_after(1))
    run_ranks(2, tmp_path / "again", resumed_run, str(other))
    assert written(other) == written(alone / "stream")


def test_a_run_of_another_default_goes_on_as_it_began(tmp_path: Path) -> None:
    """As one that was begun in stages, or by an earlier version."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        prune(str(out), "stream", slices=8, on_step=cut_after(1))
    run_ranks(2, tmp_path / "two", resumed_run, str(out))
    prune(str(tmp_path / "alone"), "stream", slices=8)
    assert written(out) == written(tmp_path / "alone")
