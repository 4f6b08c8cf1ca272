"""Signs of a real GPU: one that hangs is seen, and nothing that the working thread does holds up a look."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from gisp.replicas import signs
from gisp.replicas.signs import GpuCells, Sight, Signs

pytestmark = pytest.mark.gpu
# Of a kernel that does nothing, several times the limit. The limit is many times what stands in a full queue of small
# products, also on a GPU that others use.
CYCLES, LIMIT = 16 * 10**9, 2.0


def watched(work: Callable[[Signs], None]) -> list[Sight]:
    """What is seen of this thread while it works; a look every 0.1 s."""
    device = torch.device("cuda", torch.cuda.current_device())
    # What CUDA loads at first use may take longer than the limit where many processes do.
    data = torch.ones(16, 16, device=device)
    torch.cuda._sleep(1)
    (data @ data).cpu()
    own, stop = Signs(GpuCells(device)), threading.Event()
    seen: list[Sight] = []

    def look() -> None:
        while not stop.wait(0.1):
            seen.append(own.look())

    beside = threading.Thread(target=look)
    beside.start()
    try:
        work(own)
        torch.cuda.synchronize()
    finally:
        stop.set()
        beside.join()
        own.end()
    return seen


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "DEVICE_STILL", LIMIT)
    monkeypatch.setattr(signs, "PAUSE", 0.1)


@pytest.mark.parametrize("copies", [False, True])
def test_a_kernel_that_does_not_end_is_seen(copies: bool) -> None:
    def work(_: Signs) -> None:
        data = torch.ones(1, device="cuda")
        torch.cuda._sleep(CYCLES)
        # A copy to pageable memory keeps other threads out of the driver.
        data.cpu() if copies else torch.cuda.synchronize()

    seen = watched(work)
    # None waits for the kernel: one that did would be the only one to see it.
    assert sum(sight.stuck.startswith("its GPU") for sight in seen) > 5


@pytest.mark.parametrize("copies", [False, True])
def test_one_that_waits_for_others_is_not_stuck(copies: bool) -> None:
    def work(own: Signs) -> None:
        data = torch.ones(1, device="cuda")
        with own.waiting():
            torch.cuda._sleep(CYCLES)
        if copies:
            data.cpu()

    seen = watched(work)
    assert not any(sight.stuck for sight in seen)
    assert max(sight.waits or 0.0 for sight in seen) > LIMIT


def test_a_busy_gpu_is_not_stuck() -> None:
    def work(_: Signs) -> None:
        data = torch.randn(1024, 1024, device="cuda")
        end = time.monotonic() + 3 * LIMIT
        while time.monotonic() < end:
            data @ data

    assert not any(sight.stuck for sight in watched(work))
