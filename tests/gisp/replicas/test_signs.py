"""Whether a thread that works is told from one that is stuck, by what it uses of the host and of a GPU."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gisp.replicas import signs
from gisp.replicas.signs import Cells, Sight, Signs

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
LOOK, LIMIT = 0.05, 0.4
# Several limits long: what is no sign of work would be told by then.
LOOKS = round(4 * LIMIT / LOOK)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "STILL", LIMIT)
    monkeypatch.setattr(signs, "DEVICE_STILL", 1.5 * LIMIT)
    monkeypatch.setattr(signs, "PAUSE", LOOK)


@contextmanager
def working(work: Callable[[Signs, threading.Event], None], cells: Cells | None = None) -> Iterator[Signs]:
    """A thread that does something until it is told to stop, and its signs."""
    made: list[Signs] = []
    stop, ready = threading.Event(), threading.Event()

    def run() -> None:
        made.append(Signs(cells or Cells()))
        ready.set()
        work(made[0], stop)

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    yield made[0]
    stop.set()
    thread.join()
    made[0].end()


def looks(of: Signs, count: int) -> Iterator[Sight]:
    for _ in range(count):
        time.sleep(LOOK)
        yield of.look()


def until_stuck(of: Signs) -> str:
    return next(sight.stuck for sight in looks(of, 1000) if sight.stuck)


def nothing(_: Signs, stop: threading.Event) -> None:
    stop.wait()


def computing(_: Signs, stop: threading.Event) -> None:
    while not stop.is_set():
        pass


def polling(_: Signs, stop: threading.Event) -> None:
    while not stop.wait(LOOK):
        pass


def another_computes(own: Signs, stop: threading.Event) -> None:
    other = threading.Thread(target=computing, args=(own, stop))
    other.start()
    other.join()


def children(_: Signs, stop: threading.Event) -> None:
    """As compilers are called."""
    while not stop.is_set():
        subprocess.run([sys.executable, "-IS", "-c", "sum(range(10**6))"], check=True)


def a_long_child(_: Signs, stop: threading.Event) -> None:
    """As a compiler that a compiler driver has called."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-IS', '-c', 'while True: pass'])"
    child = subprocess.Popen([sys.executable, "-IS", "-c", code], start_new_session=True)

    def end() -> None:
        stop.wait()
        os.killpg(child.pid, signal.SIGKILL)

    threading.Thread(target=end).start()
    child.wait()


def another_writes(_: Signs, stop: threading.Event) -> None:
    def write() -> None:
        with Path("written").open("wb") as file:
            while not stop.wait(LOOK):
                file.write(bytes(2**20))
                file.flush()

    other = threading.Thread(target=write)
    other.start()
    other.join()


def waiting_for_others(own: Signs, stop: threading.Event) -> None:
    with own.waiting():
        stop.wait()


def elsewhere(own: Signs, stop: threading.Event) -> None:
    with own.elsewhere():
        stop.wait()


@pytest.mark.parametrize(
    "work",
    [computing, polling, another_computes, children, a_long_child, another_writes, waiting_for_others, elsewhere],
)
def test_one_that_gets_on_is_never_stuck(
    work: Callable[[Signs, threading.Event], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with working(work) as own:
        seen = [*looks(own, LOOKS)]
    assert not any(sight.stuck for sight in seen)
    waits = work is waiting_for_others
    assert all((sight.waits is not None) == waits for sight in seen)
    assert not waits or float(seen[-1].waits or 0) > LIMIT


def test_one_that_does_nothing_is_stuck() -> None:
    with working(nothing) as own:
        assert until_stuck(own) == f"it has done nothing for {signs.STILL:.0f} s"


def test_after_waiting_the_time_counts_anew() -> None:
    done = threading.Event()

    def work(own: Signs, stop: threading.Event) -> None:
        with own.waiting():
            done.wait()
        stop.wait()

    with working(work) as own:
        assert all(sight.waits is not None for sight in looks(own, LOOKS))
        done.set()
        seen = [*looks(own, 3)]
        assert seen[-1] == Sight(None)
        assert until_stuck(own)


def test_a_dead_disk_is_given_longer(tmp_path: Path) -> None:
    """A thread that waits for a child's exec sleeps as one does that waits for a disk: nothing wakes it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    libc = ctypes.CDLL(None)

    def work(own: Signs, stop: threading.Event) -> None:
        actions = ctypes.create_string_buffer(1024)
        libc.posix_spawn_file_actions_init(actions)
        libc.posix_spawn_file_actions_addopen(actions, 0, os.fsencode(pipe), os.O_RDONLY, 0)
        program, pid = b"/bin/true", ctypes.c_int()
        given, environment = (ctypes.c_char_p * 2)(program, None), (ctypes.c_char_p * 1)(None)
        assert libc.posix_spawn(ctypes.byref(pid), program, actions, None, given, environment) == 0
        os.waitpid(pid.value, 0)
        stop.wait()

    with working(work) as own:
        assert until_stuck(own) == f"it waits for a disk for {signs.DEVICE_STILL:.0f} s"
        os.close(os.open(pipe, os.O_WRONLY))


class Gpu(Cells):
    """A GPU that comes to numbers when it is told to, or at once."""

    behind = True

    def __init__(self) -> None:
        super().__init__()
        self.queue: deque[tuple[int, int]] = deque()
        self.hangs = True

    def write(self, cell: int, number: int) -> None:
        self.queue.append((cell, number))
        if not self.hangs:
            self.come_to(len(self.queue))

    def come_to(self, count: int) -> None:
        for _ in range(count):
            super().write(*self.queue.popleft())


def test_a_gpu_that_hangs_is_seen_while_the_host_spins() -> None:
    gpu = Gpu()
    with working(computing, gpu) as own:
        gpu.hangs = False
        gpu.come_to(len(gpu.queue))
        assert not any(sight.stuck for sight in looks(own, LOOKS))
        gpu.hangs = True
        assert until_stuck(own) == f"its GPU has done nothing for {signs.DEVICE_STILL:.0f} s"
        gpu.come_to(len(gpu.queue))
        assert own.look() == Sight(None)


def test_one_that_waits_for_a_busy_gpu_is_given_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "DEVICE_STILL", 1000.0)
    gpu = Gpu()
    with working(nothing, gpu) as own:
        assert not any(sight.stuck for sight in looks(own, LOOKS))
        gpu.hangs = False
        gpu.come_to(len(gpu.queue))
        assert until_stuck(own).startswith("it has done nothing")


def test_a_gpu_that_fails_is_told() -> None:
    class Failing(Gpu):
        def write(self, cell: int, number: int) -> None:
            raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be")

    with working(computing, Failing()) as own:
        assert until_stuck(own) == "its GPU has failed (CUDA error: unspecified launch failure)"


def test_a_gpu_waits_from_when_it_comes_to_the_collective() -> None:
    """The host is far ahead: it has begun and ended a collective that the GPU has not come to, or is in."""
    gpu = Gpu()

    def work(own: Signs, stop: threading.Event) -> None:
        with own.waiting():
            pass
        computing(own, stop)

    with working(work, gpu) as own:
        while len(gpu.queue) < 2:
            time.sleep(LOOK)
        assert own.look().waits is None
        # Whether the GPU was asked before it came to the collective or in it makes no difference.
        while gpu.read(0) != 1:
            gpu.come_to(1)
        seen = [*looks(own, LOOKS)]
        assert all(sight.waits is not None and not sight.stuck for sight in seen)
        gpu.come_to(len(gpu.queue))
        assert own.look() == Sight(None)
        assert until_stuck(own).startswith("its GPU")
