"""What processes of one host take of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

from gisp.cli import main
from gisp.errors import GispError
from gisp.replicas import environment
from gisp.replicas.environment import joined, share_cores
from gisp.replicas.group import Replicas


@pytest.fixture
def eight_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


_LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "32", "MASTER_ADDR": "host", "MASTER_PORT": "1"}


@pytest.mark.parametrize(("processes", "threads"), [(None, 8), ("1", 8), ("3", 2), ("16", 1)])
def test_processes_of_a_host_share_its_cores(
    processes: str | None, threads: int, monkeypatch: pytest.MonkeyPatch, eight_threads: None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        for name, value in _LAUNCHED.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    share_cores()
    assert torch.get_num_threads() == threads


def test_a_given_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch, eight_threads: None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    share_cores()
    assert torch.get_num_threads() == 8


def as_launched(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """The environment of the first of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**launcher, "WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "one"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def test_processes_that_have_met_may_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    as_launched(monkeypatch, 1)
    with joined("cpu") as group:
        assert (Replicas(group).timeout or timedelta()) > timedelta(days=1)


def test_others_that_do_not_come_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    as_launched(monkeypatch, 2)
    monkeypatch.setattr(environment, "_MEETING", timedelta(seconds=1))
    with pytest.raises(GispError, match=r"did not come together: .*1/2"), joined("cpu"):
        pass


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "x", "RANK is 'x' in the environment, no number"),
        ("RANK", "-1", "RANK is '-1' in the environment, no number"),
        ("RANK", "2", "RANK is 2 in the environment, of WORLD_SIZE 2"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two' in the environment, no number"),
        ("WORLD_SIZE", "0", "RANK is 0 in the environment, of WORLD_SIZE 0"),
        ("LOCAL_RANK", "0x1", "LOCAL_RANK is '0x1' in the environment, no number"),
        ("MASTER_PORT", "http", "MASTER_PORT is 'http' in the environment, no number"),
        ("MASTER_PORT", "70000", "MASTER_PORT is 70000 in the environment, no port"),
    ],
)
@pytest.mark.parametrize("command", [["prune", "m", "--data", "d", "--out", "o"], ["eval", "m", "--data", "d"]])
def test_what_no_launcher_says_is_refused(
    command: list[str],
    name: str,
    value: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    as_launched(monkeypatch, 2)
    monkeypatch.setenv(name, value)
    assert main(command) == 2
    assert capsys.readouterr().err == f"error: {words}: start the processes by torchrun, or unset it\n"
