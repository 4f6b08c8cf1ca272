"""Who is killed for not listening: a process of the same launcher that is still the one it was."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gisp.replicas import siblings
from gisp.replicas.siblings import end_sibling, this_process

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def killers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that were started to kill, in the environment of a launcher."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*given: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*given, **options))
        return started[-1]

    monkeypatch.setattr(siblings.subprocess, "Popen", start)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    return started


def told_of(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What the process would tell the others, were it a sibling of this one."""
    start = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    return {**this_process(), "pid": process.pid, "start": start}


def test_a_sibling_is_ended(sleeper: subprocess.Popen[bytes], killers: list[subprocess.Popen[bytes]]) -> None:
    end_sibling(told_of(sleeper), 0.1)
    assert killers[0].wait(30) == 0
    assert sleeper.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"launcher": 1}, {"start": ""}, {"start": "1"}], ids=str)
def test_another_process_is_not(
    other: dict[str, Any], sleeper: subprocess.Popen[bytes], killers: list[subprocess.Popen[bytes]]
) -> None:
    end_sibling({**told_of(sleeper), **other}, 0.1)
    # A number that is another's by now is found out last.
    assert len(killers) == (other == {"start": "1"})
    for killer in killers:
        killer.wait(30)
    assert sleeper.poll() is None


def test_without_a_launcher_nobody_is(
    sleeper: subprocess.Popen[bytes], killers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK")
    end_sibling(told_of(sleeper), 0.1)
    assert not killers and sleeper.poll() is None
    assert os.getppid() == this_process()["launcher"]
