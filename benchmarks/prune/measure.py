"""One timed `gisp.prune`: wall time, phases, memory, and the share of the ceiling its importance pass reaches."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup

from benchmarks.common.command import Budget
from benchmarks.common.measure import Ceilings
from benchmarks.common.registry import Model
from benchmarks.prune.flops import Widths, pass_flops
from benchmarks.prune.host import HostTimes, host_timed
from gisp import prune
from gisp.config.criteria import CRITERIA
from gisp.config.options import PRESETS, make_config
from gisp.model.structures import channels_name, heads_name, protected_layers
from gisp.replicas.environment import rank
from gisp.run.record import removed_at_digest
from gisp.run.trajectory import StepRecord, Trajectory

FULL_STEPS, FULL_TOKENS, FULL_SPARSITY = 200, 8192, 0.5
LENGTH = 256
# Steps whose median stands for the dense and for the final model; the very first also compiles kernels.
WINDOW = 5

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What a run is asked for.

    Attributes:
        length: tokens per sequence.
        fp8: 8-bit products in the importance pass.
        criterion: of the scores; ``second-order`` needs no weight gradients.
    """

    sparsity: float
    steps: int
    batch_tokens: int
    length: int = LENGTH
    fp8: bool = False
    criterion: str = str(PRESETS["fast"]["criterion"])

    @classmethod
    def make(
        cls,
        device: torch.device,
        sparsity: float,
        steps: int | None,
        batch_tokens: int | None,
        fp8: bool = False,
        criterion: str | None = None,
    ) -> Setting:
        """Defaults of the device, checked.

        Raises:
            GispError: a value out of range.
        """
        on_gpu = device.type == "cuda"
        steps = steps or (FULL_STEPS if on_gpu else 6)
        batch_tokens = batch_tokens or (FULL_TOKENS if on_gpu else 2 * LENGTH)
        config = make_config(sparsity=sparsity, steps=steps, batch_tokens=batch_tokens, criterion=criterion)
        return cls(float(config.sparsity or 0), steps, batch_tokens, fp8=fp8, criterion=str(config.criterion))

    @property
    def full(self) -> bool:
        """Whether this is the run the goals are about."""
        asked = (self.steps, self.batch_tokens, self.sparsity, self.fp8)
        return asked == (FULL_STEPS, FULL_TOKENS, FULL_SPARSITY, False)


class _BudgetSpentError(Exception):
    """Ends a run between two steps."""


def timed_run(
    shape: Model,
    model: Any,
    tokens: torch.Tensor,
    setting: Setting,
    peak: Ceilings | None,
    budget: Budget,
    group: ProcessGroup | None = None,
    after_first: Callable[[], None] = lambda: None,
    **place: Any,
) -> dict[str, Any]:
    """Prune a model and tell what it took, JSON-ready.

    Args:
        tokens: int64 [N, S], on the CPU.
        budget: the run ends after the step in which it is spent, and what was done is reported.
        peak: of all cards together, where several share the run.
        group: processes that score together; all but the first report only what they removed.
        after_first: called after the first step, which also compiles kernels and compares the pass with the model.
        place: further options of `gisp.prune`, which say where it is computed.
    """
    ends: list[float] = []

    def on_step(record: StepRecord, steps: int) -> None:
        ends.append(time.perf_counter())
        if record.step == 1:
            after_first()
        if not rank() and record.step % max(1, steps // 10) == 0:
            print(f"step {record.step}/{steps}  sparsity {record.sparsity:.4f}  {record.seconds:.3f} s", flush=True)
        if budget.over and record.step < steps:
            raise _BudgetSpentError

    options: dict[str, Any] = {
        "sparsity": setting.sparsity,
        "steps": setting.steps,
        "batch_tokens": setting.batch_tokens,
        "fp8": setting.fp8,
        "criterion": setting.criterion,
        **place,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        start = time.perf_counter()
        stopped = False
        try:
            with host_timed() as host:
                trajectory = prune(
                    model, tokens, out=run if not rank() else None, on_step=on_step, process_group=group, **options
                )
        except _BudgetSpentError:
            stopped = True
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if rank():
            return {"trajectory_sha256": trajectory_digest(trajectory)}
        trajectory = Trajectory.load(run)
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = step_rows(shape, trajectory, metrics, peak)
    peaks = [entry["peak_bytes"] for entry in metrics if entry["peak_bytes"] is not None]
    first = trajectory.steps[0].seconds
    return {
        "full": setting.full and not stopped,
        "stopped_by_budget": stopped,
        "steps": len(trajectory.steps),
        "batch_tokens": setting.batch_tokens,
        "sequence_length": setting.length,
        "fp8": setting.fp8,
        "criterion": setting.criterion,
        "sparsity": trajectory.steps[-1].sparsity,
        "seconds": seconds,
        "setup_seconds": max(0.0, ends[0] - start - first),
        "first_step_seconds": first,
        "median_step_seconds": statistics.median(record.seconds for record in trajectory.steps),
        "phases": phase_totals(metrics),
        "peak_bytes": max(peaks) if peaks else None,
        "reserved_bytes": torch.cuda.memory_reserved() if peaks else None,
        "trajectory_sha256": trajectory_digest(trajectory),
        **summary(steps),
        **host_summary(steps, host),
        "step_rows": steps,
    }


def trajectory_digest(trajectory: Trajectory) -> str:
    """SHA-256 over what was removed at which step and the losses of all steps, to the bit."""
    removed = removed_at_digest({name: at.numpy() for name, at in trajectory.removed_at.items()})
    losses = " ".join(record.loss.hex() for record in trajectory.steps)
    return hashlib.sha256(f"{removed} {losses}".encode()).hexdigest()


def widths_before(trajectory: Trajectory, step: int) -> list[Widths]:
    """Widths of every layer a step was scored at, and whether it was scored."""
    config = trajectory.config
    protected = protected_layers(trajectory.layers, config["protect_first"], config["protect_last"])

    def kept(name: str) -> int:
        at = trajectory.removed_at[name]
        return int(((at == 0) | (at >= step)).sum())

    return [
        Widths(heads=kept(heads_name(i)), channels=kept(channels_name(i)), scored=i not in protected)
        for i in range(trajectory.layers)
    ]


def step_rows(
    shape: Model, trajectory: Trajectory, metrics: Sequence[dict[str, Any]], peak: Ceilings | None
) -> list[dict[str, Any]]:
    """For every step: sparsity it started from, seconds of its phases, tokens and operations per second of its pass."""
    rows = []
    weight_grads = CRITERIA[str(trajectory.config["criterion"])].gradient == "absolute"
    for record, entry in zip(trajectory.steps, metrics, strict=True):
        seconds = entry["seconds"]["forward_backward"]
        widths = widths_before(trajectory, record.step)
        flops = pass_flops(shape, widths, record.tokens, weight_grads=weight_grads).total
        tflops = flops / max(seconds, 1e-9) / 1e12
        rows.append(
            {
                "step": record.step,
                "sparsity_before": trajectory.sparsity_at(record.step - 1),
                "seconds": entry["seconds"],
                "step_seconds": record.seconds,
                "tokens_per_second": record.tokens / max(seconds, 1e-9),
                "tflops": tflops,
                "percent_of_matmul": 100 * tflops / peak.matmul_tflops if peak else None,
                "peak_bytes": entry["peak_bytes"],
            }
        )
    return rows


def window_rows(rows: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The first and the last steps; the very first, which compiles kernels, is left out if there are others."""
    return rows[1 : 1 + WINDOW] or rows, rows[1:][-WINDOW:] or rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median speed of the pass over the first steps and the last."""
    found: dict[str, Any] = {}
    for where, window in zip(("dense", "end"), window_rows(rows), strict=True):
        for key in ("tokens_per_second", "tflops", "percent_of_matmul"):
            values = [row[key] for row in window if row[key] is not None]
            found[f"{key}_{where}"] = statistics.median(values) if values else None
    return found


def host_summary(rows: Sequence[dict[str, Any]], host: HostTimes) -> dict[str, Any]:
    """Median seconds of the parts of a step, on the GPU and on the host, over the first steps and the last."""
    found: dict[str, Any] = {"writes": host.written()}
    steps = {
        "step": [row["step_seconds"] for row in rows],
        **{phase: [row["seconds"][phase] for row in rows] for phase in ("forward_backward", "select")},
        **host.parts,
    }
    for name, seconds in steps.items():
        for where, window in zip(("dense", "end"), window_rows(seconds), strict=True):
            if window:
                found.setdefault(f"step_{where}", {})[name] = statistics.median(window)
    return found


def phase_totals(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of every phase, summed over the steps."""
    totals: dict[str, float] = {}
    for entry in metrics:
        for phase, seconds in entry["seconds"].items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    return totals
