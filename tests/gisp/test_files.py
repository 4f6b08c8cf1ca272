"""Files and folders with one writer: who holds a lock, what a killed writer leaves, what is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gisp.errors import GispError
from gisp.files import final_name, lock_beside, one_writer, remove_stale, temporary_path, write_atomic

HOLD = """
import sys, time
from pathlib import Path
from gisp.files import lock_beside, one_writer
out = Path(sys.argv[1])
with one_writer(out, lock_beside(out)):
    print("held", flush=True)
    sys.stdin.read()
"""


def held_elsewhere(out: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of a place until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path, end: signal.Signals | None) -> None:
    out = tmp_path / "out"
    first = held_elsewhere(out)
    refused = pytest.raises(GispError, match="out is being written by another process")
    with refused, one_writer(out, lock_beside(out)):
        pass
    if end is None:
        first.communicate()
        assert list(tmp_path.iterdir()) == []
    else:
        first.send_signal(end)
        first.wait()
        assert list(tmp_path.iterdir()) == [lock_beside(out)], "a killed process cannot take its lock file along"
    left = sorted(tmp_path.iterdir())
    with pytest.raises(KeyError), one_writer(out, lock_beside(out)):
        raise KeyError
    assert sorted(tmp_path.iterdir()) == left
    with one_writer(out, lock_beside(out)) as alone:
        assert alone
    assert list(tmp_path.iterdir()) == []


def test_threads_are_writers_of_their_own_and_a_writer_may_call_another(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    refused = []

    def other() -> None:
        try:
            with one_writer(tmp_path, lock):
                refused.append(False)
        except GispError:
            refused.append(True)

    with one_writer(tmp_path, lock), one_writer(tmp_path, lock):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    other()
    assert refused == [True, False]


def test_folders_made_for_a_lock_go_again_unless_something_was_written(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    with one_writer(deep, deep / ".lock"):
        pass
    assert list(tmp_path.iterdir()) == []
    with one_writer(deep, deep / ".lock"):
        write_atomic(deep / "file", b"kept")
    assert [path.name for path in deep.iterdir()] == ["file"]


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch, number: str) -> None:
    import errno

    from gisp import files

    def refuse(*_: object) -> None:
        raise OSError(getattr(errno, number), "no locks")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with one_writer(tmp_path, tmp_path / ".lock") as alone:
        assert not alone


def test_only_what_was_to_become_the_path_is_stale(tmp_path: Path) -> None:
    out, other, dotted = tmp_path / "out", tmp_path / "other", tmp_path / "out.d"
    left = [temporary_path(out), temporary_path(out)]
    left[0].mkdir()
    (left[0] / "weights").write_text("half")
    left[1].write_text("half")
    foreign = [temporary_path(other), temporary_path(dotted), tmp_path / ".out.tmp", tmp_path / ".out.12.tmp"]
    for path in foreign:
        path.mkdir()
    remove_stale(out)
    assert sorted(tmp_path.iterdir()) == sorted(foreign)
    assert final_name(temporary_path(dotted)) == "out.d"
    assert final_name(out) is None


def test_an_interrupted_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]
