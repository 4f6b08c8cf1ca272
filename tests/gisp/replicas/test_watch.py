"""Processes of a run that die, hang or fail: the others end too, and one line says which it was."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import end_of, start_ranks
from run_cases import OPTIONS
from tiny import tiny_model, tiny_tokens
from torch import distributed

import gisp
from gisp.replicas import watch
from gisp.replicas.errors import ReplicaError
from gisp.run.trajectory import StepRecord


def prune(out: str, how: str, broken: int) -> None:
    """A run in which the process of one rank fails in its second step; the others say what they are told."""
    watch.BEAT, watch.SILENCE, watch.GRACE = 0.1, 4.0, 1.0
    rank, beats, beat = distributed.get_rank(), [0], watch._beat

    def counted(*given: Any) -> dict[str, Any]:
        beats[0] += 1
        return beat(*given)

    watch._beat = counted  # type: ignore[assignment]
    without_store = watch.Watch._without_store

    def late(self: watch.Watch) -> str:
        # So late that those before have told it, and ended unless they wait.
        time.sleep(3 * watch.BEAT * max(rank - 1, 0))
        return without_store(self)

    watch.Watch._without_store = late  # type: ignore[method-assign]

    def fail(record: StepRecord, steps: int) -> None:
        if record.step != 2:
            return
        if rank == broken:
            if how == "error":
                raise gisp.GispError("the disk is full")
            if how == "memory":
                raise MemoryError
            # The next beat says what it is at now, and it is out when the one after it is made.
            heard = beats[0] + 2
            while beats[0] < heard:
                time.sleep(watch.BEAT)
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])

    try:
        gisp.prune(
            tiny_model(),
            tiny_tokens(16, 16),
            out=out,
            process_group=distributed.group.WORLD,
            on_step=fail,
            **OPTIONS,
        )
    except ReplicaError as error:
        print(f"told already: {error}" if error.told else f"telling: {error}", flush=True)
    except gisp.GispError as error:
        print(f"error: {error}", flush=True)
    else:
        raise AssertionError("the run must not reach its end")


def ends(tmp_path: Path, size: int, how: str, broken: int, *, store: str = "file") -> list[Any]:
    out, folder = tmp_path / "run", tmp_path / "ranks"
    started = start_ranks(size, folder, prune, str(out), how, broken, store=store)
    found = end_of(started, folder, [rank for rank in range(size) if rank != broken or how in ("error", "memory")])
    # What was finished is kept, by a run that can go on.
    assert len(gisp.Trajectory.load(out).steps) >= 1
    return found


@pytest.mark.parametrize("broken", [0, 1])
def test_a_killed_process_is_named(tmp_path: Path, broken: int) -> None:
    found = ends(tmp_path, 2, "killed", broken)
    assert found[broken].code == -signal.SIGKILL
    other = found[1 - broken]
    assert other.code == 0
    assert f"telling: rank {broken} (" in other.text and "ended without a word" in other.text


def test_a_process_that_takes_the_store_with_it_is_named(tmp_path: Path) -> None:
    found = ends(tmp_path, 3, "killed", 0, store="tcp")
    assert "telling: the store of this run is gone: the process of rank 0" in found[1].text
    assert "telling: " not in found[2].text and "the store of this run is gone" in found[2].text


def test_a_process_that_is_stopped_with_the_store_is_named(tmp_path: Path) -> None:
    found = ends(tmp_path, 2, "stopped", 0, store="tcp")
    assert found[1].code == watch.EXIT_CODE
    assert "rank 0 (" in found[1].text and "was stopped by a signal; it was last seen at work" in found[1].text


def test_one_of_several_tells_of_a_killed_one(tmp_path: Path) -> None:
    found = ends(tmp_path, 4, "killed", 2)
    texts = [ended.text for rank, ended in enumerate(found) if rank != 2]
    assert sum("telling: " in text for text in texts) == 1
    assert all("rank 2 (" in text for text in texts)


def test_a_process_that_waits_for_one_that_hangs_is_ended(tmp_path: Path) -> None:
    found = ends(tmp_path, 2, "stopped", 1)
    assert found[0].code == watch.EXIT_CODE
    last = found[0].text.splitlines()[-1]
    assert last.startswith("error: rank 1 (") and "was stopped by a signal; it was last seen at work (pruning" in last


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_is_told_once(tmp_path: Path, broken: int) -> None:
    found = ends(tmp_path, 2, "error", broken)
    # The first process raises what it met itself, others as one that speaks for them.
    assert found[broken].text.splitlines()[-1] == ("error: " if broken == 0 else "telling: ") + "the disk is full"
    assert "told already: " in found[1 - broken].text and "the disk is full" in found[1 - broken].text


def test_one_that_runs_out_of_memory_is_named(tmp_path: Path) -> None:
    found = ends(tmp_path, 2, "memory", 1)
    last = found[1].text.splitlines()[-1]
    assert last.startswith("telling: rank 1 (") and "is out of memory (MemoryError): give a smaller" in last
    assert "told already: " in found[0].text
