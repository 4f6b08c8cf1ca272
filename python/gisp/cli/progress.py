"""Progress of a run: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from gisp.run.trajectory import StepRecord

_LINES = 10


class StepProgress:
    """Shows step, sparsity, loss, tokens per second and time left, on stderr."""

    def __init__(self, title: str) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._live = self.console.is_terminal
        self._task: TaskID | None = None
        self._part: TaskID | None = None
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> StepProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        # Off a terminal the bar never started, and stopping it would print an empty line.
        if self._live:
            self._bar.stop()

    def say(self, message: str) -> None:
        """One line beside the bar."""
        self.console.print(message, soft_wrap=True, markup=False)

    def part(self, done: int, parts: int) -> None:
        """Show how far a step is that takes long."""
        if self._live:
            if self._part is None:
                self._bar.start()
                self._part = self._bar.add_task("", detail="of the step")
            if done == 1:
                self._bar.reset(self._part, total=parts)
            self._bar.update(self._part, completed=done, visible=done < parts)
        elif done % max(1, parts // _LINES) == 0:
            self.say(f"{done}/{parts} of the step")

    def step(self, record: StepRecord, steps: int) -> None:
        """Show a finished step."""
        speed = record.tokens / max(record.seconds, 1e-9)
        detail = f"sparsity {record.sparsity:.4f}  loss {record.loss:.4f}  {speed:,.0f} tokens/s"
        if self._live:
            if self._task is None:
                self._bar.start()
                self._task = self._bar.add_task("", total=steps, completed=record.step - 1, detail=detail)
            self._bar.update(self._task, completed=record.step, detail=detail)
            return
        now = time.perf_counter()
        self._first = self._first or (record.step - 1, now - record.seconds)
        if record.step % max(1, steps // _LINES) == 0 or record.step == steps:
            step, started = self._first
            left = (now - started) / (record.step - step) * (steps - record.step)
            self.say(f"step {record.step}/{steps}  {detail}  ETA {left:.0f} s")
