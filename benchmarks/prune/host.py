"""Where the host spends a step, beside what the GPU does of it: launching, waiting, compacting, writing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common.command import table
from gisp.model.shrink import ShrinkableModel
from gisp.run.folder import RunFolder
from gisp.run.setup import Setup
from gisp.run.step import Transfer
from gisp.select.selector import Selector

# What a step calls once each: what the host does then.
_PARTS: dict[str, tuple[type, str]] = {
    "launch_pass": (Setup, "score"),
    "launch_select": (Selector, "rank"),
    "wait": (Transfer, "fetch"),
    "compact": (ShrinkableModel, "remove"),
    "hand_over": (RunFolder, "commit"),
}
_MEGABYTE = 1e6


class HostTimes:
    """Seconds of the host by part of a step, and of the writes beside it.

    Attributes:
        parts: name -> seconds of every step.
        writes: seconds and bytes of every write; one may hold several steps.
    """

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {name: [] for name in _PARTS}
        self.writes: list[tuple[float, int]] = []

    def written(self) -> dict[str, Any]:
        """How many writes there were, their median seconds and the bytes of the folder after the last; JSON-ready."""
        if not self.writes:
            return {"count": 0}
        seconds, sizes = zip(*self.writes, strict=True)
        return {"count": len(seconds), "seconds": statistics.median(seconds), "bytes": sizes[-1]}


@contextmanager
def host_timed() -> Iterator[HostTimes]:
    """Inside, runs of this process are timed."""
    times = HostTimes()
    with ExitStack() as patches:
        for name, (owner, method) in _PARTS.items():
            patches.enter_context(patch.object(owner, method, _timed(getattr(owner, method), times.parts[name])))
        # By its own name, since a step is handed over before it is written, in a thread.
        patches.enter_context(patch.object(RunFolder, "_write", _written(RunFolder._write, times.writes)))
        yield times


def _timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **options)
        seconds.append(time.perf_counter() - start)
        return result

    return timed


def _written(method: Callable[..., None], writes: list[tuple[float, int]]) -> Callable[..., None]:
    def timed(folder: RunFolder, *args: Any) -> None:
        start = time.perf_counter()
        method(folder, *args)
        seconds = time.perf_counter() - start
        writes.append((seconds, sum(path.stat().st_size for path in Path(folder.path).rglob("*") if path.is_file())))

    return timed


def show_host(runs: Sequence[dict[str, Any]]) -> str:
    """A table of milliseconds of a step, dense / at the end; empty without runs that hold them.

    The GPU's pass and selection are on its own clock, everything else on the host's. The host launches a pass while the
    GPU computes it, and waits for what is left; a pass takes about the greater of the two. Writes run beside the steps.
    """
    lines = []
    for run in runs:
        writes = run.get("writes")
        if writes is None:
            continue
        dense, end = run["step_dense"], run["step_end"]
        names = ("step", "forward_backward", "select", *_PARTS)
        written = f"{writes['count']} of {run['steps']} steps"
        if writes["count"]:
            written += f", {1000 * writes['seconds']:.0f} ms of {writes['bytes'] / _MEGABYTE:.2f} MB"
        parts = [f"{1000 * dense[name]:.1f} / {1000 * end[name]:.1f}" for name in names if name in dense]
        lines.append([run["model"], *parts, written])
    host = ("host: launches pass", "launches selection", "waits", "compacts", "hands over")
    return table(("ms a step, dense / end", "step", "pass", "selection", *host, "writes"), lines) if lines else ""
