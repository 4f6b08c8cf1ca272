"""Processes that live and do not get on end the others; those that are slow do not."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ranks import end_of, run_ranks, start_ranks
from run_cases import OPTIONS
from run_files import written
from tiny import tiny_model, tiny_tokens
from torch import distributed

import gisp
from gisp.replicas import signs, watch
from gisp.replicas.errors import ReplicaError
from gisp.replicas.group import Replicas
from gisp.run.setup import Setup
from gisp.run.trajectory import StepRecord

STILL = 3.0


def hold_the_interpreter(seconds: int) -> None:
    """As a long call of a library that does not let other threads run."""
    ctypes.PyDLL(None).sleep(seconds)


def compute() -> None:
    end = time.monotonic() + 3 * STILL
    while time.monotonic() < end:
        pass


def poll() -> None:
    for _ in range(round(30 * STILL)):
        time.sleep(0.1)


STUCK: dict[str, Callable[[], object]] = {
    "nothing": threading.Event().wait,
    "hangs in a library": lambda: hold_the_interpreter(1000),
}
SLOW: dict[str, Callable[[], object]] = {
    "computes": compute,
    "polls": poll,
    "holds the interpreter": lambda: hold_the_interpreter(2),
}


def prune(out: str, at_score: str, broken: int, on_step: str = "") -> None:
    """A run in which one process does something else in its second step, or after it; others say what they are told."""
    watch.BEAT, watch.SILENCE, watch.GRACE, signs.STILL = 0.1, 1.0, 1.0, STILL
    score, mine = Setup.score, distributed.get_rank() == broken

    def scored(self: Setup, step: int) -> Any:
        if step == 2 and mine and at_score:
            {**SLOW, **STUCK}[at_score]()
        return score(self, step)

    def after(record: StepRecord, steps: int) -> None:
        if record.step == 2 and mine and on_step:
            threading.Event().wait(3 * STILL)
        if on_step == "":
            Path(f"{out}-{distributed.get_rank()}-{record.step}").touch()

    Setup.score = scored  # type: ignore[method-assign]
    group = distributed.group.WORLD
    try:
        gisp.prune(tiny_model(), tiny_tokens(16, 16), out=out, process_group=group, on_step=after, **OPTIONS)
    except ReplicaError as error:
        print(f"told already: {error}" if error.told else f"telling: {error}", flush=True)


def whole(out: str) -> None:
    gisp.prune(
        tiny_model(), tiny_tokens(16, 16), out=out, process_group=distributed.group.WORLD, resume=True, **OPTIONS
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    gisp.prune(tiny_model(), tiny_tokens(16, 16), out=out, slices=4, **OPTIONS)
    return out


@pytest.mark.parametrize(
    ("how", "broken", "words"),
    [
        ("nothing", 0, "is stuck, it has done nothing for 3 s"),
        ("nothing", 1, "is stuck, it has done nothing for 3 s"),
        ("hangs in a library", 1, "lives but did not come to run for 3 s"),
    ],
)
def test_a_stuck_process_is_named_with_what_it_did(
    tmp_path: Path, undisturbed: Path, how: str, broken: int, words: str
) -> None:
    out, ranks = tmp_path / "run", tmp_path / "ranks"
    # One that holds the interpreter cannot end itself.
    awaited = [0, 1] if how == "nothing" else [1 - broken]
    found = end_of(start_ranks(2, ranks, prune, str(out), how, broken), ranks, awaited)
    lines = [line for ended in found for line in ended.text.splitlines() if line.startswith(("error: ", "telling: "))]
    assert len(lines) == 1 and f"rank {broken} (" in lines[0] and words in lines[0], lines
    # Of one that does not run the last beat tells, which may be of the step before.
    done = "1 of 4 done, forward_backward)"
    assert f"at work (pruning, {done}" in lines[0] if how == "nothing" else "; it was last seen " in lines[0]
    assert [found[rank].code for rank in awaited] == [watch.EXIT_CODE] * len(awaited)
    run_ranks(2, tmp_path / "again", whole, str(out))
    assert written(out) == written(undisturbed)


@pytest.mark.parametrize(
    ("at_score", "on_step"), [("computes", ""), ("polls", ""), ("holds the interpreter", ""), ("", "stands still")]
)
def test_a_slow_process_is_not_ended(tmp_path: Path, undisturbed: Path, at_score: str, on_step: str) -> None:
    run_ranks(2, tmp_path / "ranks", prune, str(tmp_path / "run"), at_score, 1, on_step)
    assert written(tmp_path / "run") == written(undisturbed)


def test_all_may_be_stopped_and_go_on(tmp_path: Path, undisturbed: Path) -> None:
    """As Ctrl-Z and ``fg`` do."""
    out, ranks = tmp_path / "run", tmp_path / "ranks"
    started = start_ranks(2, ranks, prune, str(out), "polls", 1)
    while not all(Path(f"{out}-{rank}-1").exists() for rank in range(2)):
        time.sleep(0.05)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in started:
            assert process.pid is not None
            os.kill(process.pid, number)
        time.sleep(3.0 if number == signal.SIGSTOP else 0.0)
    assert [ended.code for ended in end_of(started, ranks)] == [0, 0]
    assert written(out) == written(undisturbed)


def outlast(how: str) -> None:
    """Wait longer than a limit for a process that works, or for all."""
    watch.BEAT, watch.SILENCE, watch.GRACE, watch.LATE = 0.1, 1.0, 1.0, 1.0 if how in ("late", "broken") else 600.0
    rank = distributed.get_rank()
    replicas = Replicas(distributed.new_group(timeout=timedelta(seconds=4 if how == "raises" else 60)))
    if how == "aborts":
        Replicas._aborts_after = property(lambda _: timedelta(seconds=4))  # type: ignore[assignment, method-assign]
    try:
        with warnings.catch_warnings(record=True) as told, replicas.watched():
            warnings.simplefilter("always")
            if how == "broken":
                # As a message that is lost on the way.
                with replicas.waiting():
                    threading.Event().wait()
            if rank:
                time.sleep(8)
            replicas.exchange(b"")
        print(*(f"warning: {warning.message}" for warning in told), sep="\n", flush=True)
    except ReplicaError as error:
        print(f"told already: {error}" if error.told else f"telling: {error}", flush=True)


def told_after_outlasting(folder: Path, how: str) -> str:
    found = end_of(start_ranks(2, folder, outlast, how), folder)
    lines = [line for ended in found for line in ended.text.splitlines() if not line.startswith("told already")]
    (line,) = [line for line in lines if line.startswith(("error: ", "telling: ", "warning: "))]
    return line


def test_the_time_out_of_a_group_holds_and_tells_who_is_late(tmp_path: Path) -> None:
    line = told_after_outlasting(tmp_path / "ranks", "raises")
    assert line.startswith("telling: the time-out of 4 s of the process group has passed while others waited: rank 1 (")
    assert line.endswith("was last seen at work")


def test_where_torch_would_abort_a_line_comes_before(tmp_path: Path) -> None:
    line = told_after_outlasting(tmp_path / "ranks", "aborts")
    assert line.startswith("error: the time-out of 4 s of the process group has passed while others waited: rank 1 (")


def test_one_that_works_long_is_told_of(tmp_path: Path) -> None:
    line = told_after_outlasting(tmp_path / "ranks", "late")
    assert line.startswith("warning: other processes have waited for 1 s: rank 1 (")


def test_processes_that_all_wait_have_lost_their_connection(tmp_path: Path) -> None:
    line = told_after_outlasting(tmp_path / "ranks", "broken")
    assert line.startswith("error: all processes have waited for one another for 1 s, what connects them has failed")
