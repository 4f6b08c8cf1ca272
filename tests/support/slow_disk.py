"""A disk that keeps a write waiting until a run has gone on, and what was written to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from gisp.files import write_atomic
from gisp.run.trajectory import StepRecord, Trajectory


class Held:
    """A disk on which the file of a name is not written before the run has ended ``until`` steps."""

    def __init__(self, name: str, until: int) -> None:
        self.name, self.until, self.go = name, until, threading.Event()

    def write(self, path: Path, data: bytes) -> None:
        if path.name == self.name:
            assert self.go.wait(60)
        write_atomic(path, data)

    def on_step(self, record: StepRecord, steps: int) -> None:
        if record.step == self.until:
            self.go.set()


def counted(save: Callable[..., None], records: list[int]) -> Callable[..., None]:
    def counting(self: Trajectory, folder: Path) -> None:
        records.append(len(self.steps))
        save(self, folder)

    return counting
