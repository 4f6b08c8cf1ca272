"""What goes wrong in one process of a run in stages: all end, one line says why, and the run goes on later."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import end_of, run_ranks, start_ranks
from run_cases import OPTIONS
from run_files import written
from tiny import tiny_model, tiny_tokens
from torch import distributed

import gisp
from gisp.replicas import agreement, watch
from gisp.replicas.errors import ReplicaError
from gisp.run.trajectory import StepRecord


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one shape, and the undisturbed run of the first."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "model")
    tiny_model(seed=3).save_pretrained(folder / "other")
    gisp.prune(folder / "model", tiny_tokens(16), out=folder / "whole", slices=8, **OPTIONS)
    return folder


def full_disk(_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def broken_run(model: str, out: str, how: str, broken: int) -> None:
    """A run in two stages, in which one process fails in its second step; the others say what they are told."""
    watch.BEAT, watch.SILENCE, watch.GRACE = 0.1, 4.0, 1.0

    def fail(record: StepRecord, steps: int) -> None:
        if record.step != 2 or distributed.get_rank() != broken:
            return
        if how == "disk":
            setattr(os, "fsync", full_disk)  # noqa: B010 - its type is another one's
        elif how == "memory":
            raise MemoryError
        else:
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])

    group = distributed.group.WORLD
    try:
        gisp.prune(model, tiny_tokens(16), out=out, process_group=group, stages=2, on_step=fail, **OPTIONS)
    except ReplicaError as error:
        print(f"told already: {error}" if error.told else f"telling: {error}", flush=True)
    except gisp.GispError as error:
        print(f"telling: {error}", flush=True)
    else:
        raise AssertionError("the run must not reach its end")


def resumed_run(model: str, out: str) -> None:
    gisp.prune(model, tiny_tokens(16), out=out, process_group=distributed.group.WORLD, stages=2, resume=True, **OPTIONS)


@pytest.mark.parametrize(
    ("size", "how", "broken", "words"),
    [
        (2, "stopped", 0, "rank 0 ("),
        (2, "memory", 1, "is out of memory (MemoryError): give a smaller"),
        (4, "stopped", 3, "rank 3 ("),
        (4, "killed", 2, "rank 2 ("),
        (4, "disk", 0, "the disk is full, free some space (a run continues with --resume)"),
    ],
)
def test_one_line_says_what_failed_and_the_run_goes_on(
    place: Path, tmp_path: Path, size: int, how: str, broken: int, words: str
) -> None:
    out, ranks = tmp_path / "run", tmp_path / "ranks"
    started = start_ranks(size, ranks, broken_run, str(place / "model"), str(out), how, broken)
    gone = how in ("killed", "stopped")
    found = end_of(started, ranks, [rank for rank in range(size) if not (gone and rank == broken)])
    # A process that waits in a collective cannot raise: it tells as it ends.
    lines = [line for ended in found for line in ended.text.splitlines() if line.startswith(("telling: ", "error: "))]
    assert len(lines) == 1 and words in lines[0], lines
    if gone:
        assert {"killed": "ended without a word", "stopped": "was stopped by a signal"}[how] in lines[0]
    assert 1 <= len(gisp.Trajectory.load(out).steps) < OPTIONS["steps"]
    run_ranks(size, tmp_path / "again", resumed_run, str(place / "model"), str(out))
    assert written(out) == written(place / "whole")


UNLIKE: tuple[tuple[str, str], ...] = (
    ("data", "rank 1 has data "),
    ("model", "rank 1 has files of the model "),
    ("code", "rank 1 has code "),
    ("seed", "rank 1 has option seed 7, rank 0 has 0"),
)


def unlike_runs(folder: str) -> None:
    other = distributed.get_rank() == 1
    for what, words in UNLIKE:
        if what == "code":
            agreement.code_digest = lambda: "b" * 64 if other else "a" * 64
        differs = other and what
        model = f"{folder}/{'other' if differs == 'model' else 'model'}"
        options: dict[str, Any] = {**OPTIONS, "seed": 7 if differs == "seed" else 0}
        tokens = tiny_tokens(16, seed=9 if differs == "data" else 1)
        with pytest.raises(gisp.GispError) as caught:
            gisp.prune(model, tokens, process_group=distributed.group.WORLD, stages=2, **options)
        assert words in str(caught.value), (words, str(caught.value))
        if what == "code":
            agreement.code_digest = lambda: "a" * 64
    # One that ends first would break the other's last exchange.
    Path(f"{folder}/done-{distributed.get_rank()}").touch()
    while len([*Path(folder).glob("done-*")]) < 4:
        time.sleep(0.05)


def test_what_one_process_has_otherwise_is_named(place: Path, tmp_path: Path) -> None:
    run_ranks(4, tmp_path / "ranks", unlike_runs, str(place))
