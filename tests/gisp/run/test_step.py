"""Steps are written one at a time, beside the run or within it; what a step fetches."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from run_cases import cut_after
from slow_disk import Held, counted
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.model.shrink import ShrinkableModel
from gisp.run import loop, trajectory
from gisp.run.step import StepWriter, Transfer
from gisp.run.trajectory import StepRecord, Trajectory

STEPS = 6


class SlowDisk:
    """Writes of numbers that last until they are let go."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.ended: list[int] = []
        self.free = threading.Event()

    def step(self, number: int) -> Callable[[], None]:
        def write() -> None:
            self.began.append(number)
            assert self.free.wait(60)
            self.ended.append(number)

        return write


def test_a_step_is_on_disk_at_once_unless_writes_overlap():
    disk = SlowDisk()
    disk.free.set()
    writer = StepWriter(overlap=False)
    writer.take(disk.step(1))
    assert disk.ended == [1] and writer.held_up > 0
    writer.close()
    assert disk.ended == [1]


def test_steps_that_end_within_a_write_are_written_with_the_last_of_them():
    disk = SlowDisk()
    writer = StepWriter(overlap=True)
    for number in (1, 2, 3):
        writer.take(disk.step(number))
    assert disk.ended == []
    disk.free.set()
    writer.flush()
    assert disk.began == disk.ended == [1, 3]
    writer.take(disk.step(4))
    writer.close()
    writer.close()
    assert disk.began == disk.ended == [1, 3, 4]


def test_writes_rest_as_long_as_they_take_most_of_the_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr("gisp.run.step.time.perf_counter", lambda: now)
    written: list[int] = []

    def step(number: int) -> Callable[[], None]:
        def write() -> None:
            nonlocal now
            written.append(number)
            now += 1

        return write

    writer = StepWriter(overlap=True)
    for number, at in enumerate((100.0, 101.5, 109.9, 110.1), start=1):
        if writer._written is not None:
            concurrent.futures.wait([writer._written])
        now = at
        writer.take(step(number))
    writer.close()
    # The write from 100 to 101 rests until 110.
    assert written == [1, 4]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises; a launcher of processes that ran in this one before leaves a handler of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("end", ["flush", "close"])
def test_ctrl_c_within_a_write_loses_no_step(end):
    disk = SlowDisk()
    writer = StepWriter(overlap=True)
    for number in (1, 2):
        writer.take(disk.step(number))

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        disk.free.set()

    # The main thread waits by then, or is interrupted as it begins to.
    threading.Timer(0.2, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        getattr(writer, end)()
    writer.close()
    assert disk.ended == [1, 2]


def fail() -> None:
    raise OSError("disk")


@pytest.mark.parametrize("end", ["take", "flush", "close"])
def test_a_failed_write_is_raised_once_and_not_tried_again(end):
    disk = SlowDisk()
    disk.free.set()
    writer = StepWriter(overlap=True)
    writer.take(fail)
    assert writer._written is not None
    concurrent.futures.wait([writer._written])
    with pytest.raises(OSError, match="disk"):
        writer.take(disk.step(2)) if end == "take" else getattr(writer, end)()
    writer.close()
    assert disk.ended == []


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes beside the run, as on a GPU."""
    monkeypatch.setattr(loop, "StepWriter", lambda **_: StepWriter(overlap=True))


def run(out, on_step: Callable[[StepRecord, int], None] | None = None, **more: Any) -> Trajectory:
    options: dict[str, Any] = {
        "sparsity": 0.4,
        "steps": STEPS,
        "align": 4,
        "batch_tokens": 64,
        "dtype": "float32",
        "device": "cpu",
        **more,
    }
    return gisp.prune(tiny_model(), tiny_tokens(), out=out, on_step=on_step, resume=out.exists(), **options)


def same(one, other) -> bool:
    files = ("trajectory.safetensors", f"state/step-{STEPS:05d}.safetensors")
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    steps = [[{**json.loads(line), "seconds": 0, "tokens_per_second": 0} for line in each] for each in lines]
    return steps[0] == steps[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_overlapped_writes_leave_the_same_run_and_lose_no_finished_step(tmp_path, monkeypatch, request):
    plain, late = tmp_path / "plain", tmp_path / "late"
    run(plain)
    request.getfixturevalue("behind")
    with pytest.raises(KeyboardInterrupt):
        run(late, cut_after(3))
    assert len(Trajectory.load(late).steps) == 3
    found = run(late)
    assert same(plain, late)
    assert Trajectory.load(late).state_sha256 == found.state_sha256


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("name", ["trajectory.safetensors", "trajectory.json"])
def test_a_disk_slower_than_the_steps_gets_fewer_writes_and_the_same_run(tmp_path, monkeypatch, name):
    run(tmp_path / "plain")
    disk = Held(name, 4)
    records: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(trajectory, "write_atomic", disk.write)
        patch.setattr(Trajectory, "save", counted(Trajectory.save, records))
        run(tmp_path / "slow", disk.on_step)
    assert records[0] == 1 and records[1] > 4 and records[-1] == STEPS
    assert same(tmp_path / "plain", tmp_path / "slow")


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("last", ["state", "trajectory.safetensors", "trajectory.json"])
def test_a_run_killed_within_a_write_of_many_steps_goes_on_from_the_one_before(tmp_path, monkeypatch, last):
    run(tmp_path / "plain")
    disk, out = Held("trajectory.json", 4), tmp_path / "cut"

    class Killed(BaseException):
        pass

    def write(path, data: bytes) -> None:
        # Of the second write, which holds several steps, nothing comes after the file `last`.
        if path.name == "trajectory.json" and out.joinpath("trajectory.json").exists():
            raise Killed
        if path.name == "trajectory.safetensors" and last == "state" and out.joinpath(path.name).exists():
            raise Killed
        disk.write(path, data)

    with monkeypatch.context() as patch:
        if last != "trajectory.json":
            patch.setattr(trajectory, "write_atomic", write)
        else:
            patch.setattr("gisp.run.folder.RunFolder._remove_others", killed_after(Killed))
            patch.setattr(trajectory, "write_atomic", disk.write)
        with pytest.raises(Killed):
            run(out, disk.on_step)
    left = Trajectory.load(out)
    assert all(at.max() <= len(left.steps) for at in left.removed_at.values())
    run(out)
    assert same(tmp_path / "plain", out)


class Reused:
    """Fetches into memory that the next fetch overwrites, as on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.memory: dict[int, torch.Tensor] = {}

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        for number, tensor in enumerate(tensors):
            own = self.memory.get(number)
            if own is None or own.shape != tensor.shape:
                own = self.memory[number] = torch.empty_like(tensor)
            own.copy_(tensor)
        return [self.memory[number] for number in range(len(tensors))]


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize(("owner", "name"), [(loop, "check_scores"), (ShrinkableModel, "remove")])
def test_a_run_that_ends_within_a_step_leaves_the_ones_before_as_they_were(tmp_path, monkeypatch, owner, name):
    run(tmp_path / "plain", ema=0.5)
    disk, out, calls = Held("trajectory.json", STEPS), tmp_path / "cut", []
    own = getattr(owner, name)

    def ending(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            # The first step is being written, the next two are left.
            disk.go.set()
            raise KeyboardInterrupt
        own(*given)

    with monkeypatch.context() as patch:
        patch.setattr(trajectory, "write_atomic", disk.write)
        patch.setattr(loop, "Transfer", Reused)
        patch.setattr(owner, name, ending)
        with pytest.raises(KeyboardInterrupt):
            run(out, ema=0.5)
    assert len(Trajectory.load(out).steps) == 3
    run(out, ema=0.5)
    assert same(tmp_path / "plain", out)


def killed_after(error: type[BaseException]) -> Callable[..., None]:
    """Ends a run once steps are committed and what is left of those before is to go."""
    seen: list[int] = []

    def remove(self, step: int) -> None:
        seen.append(step)
        if len(seen) == 2:
            raise error

    return remove


def test_a_cpu_fetch_returns_what_it_was_given():
    tensors = [torch.arange(3), torch.tensor(2.0)]
    assert [t.tolist() for t in Transfer(torch.device("cpu")).fetch(tensors)] == [[0, 1, 2], 2.0]
