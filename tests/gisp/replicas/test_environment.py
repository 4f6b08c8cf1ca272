"""What processes of one host take of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gisp.replicas.environment import share_cores


@pytest.fixture
def eight_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("processes", "threads"), [(None, 8), ("1", 8), ("3", 2), ("16", 1)])
def test_processes_of_a_host_share_its_cores(
    processes: str | None, threads: int, monkeypatch: pytest.MonkeyPatch, eight_threads: None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    share_cores()
    assert torch.get_num_threads() == threads


def test_a_given_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch, eight_threads: None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    share_cores()
    assert torch.get_num_threads() == 8
