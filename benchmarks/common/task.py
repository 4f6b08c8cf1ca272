"""A benchmark task: one op at one shape with everything that can compute it, checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.common.measure import Ceilings, Inputs, measure_together, restorer, rotation

Row = dict[str, Any]
Implementation = Callable[..., Any]
AUTO = "auto"
EAGER = "eager"
COMPILED = "compiled"
_LABEL_ORDER = ("model", "projection", "rows", "width", "tokens", "kept")


@dataclass
class Prepared:
    """Operands of a task on the device and what computes it.

    Attributes:
        inputs: arguments of every implementation.
        implementations: name -> function; :data:`AUTO` is what the library runs when nothing is asked for.
        check: raises AssertionError for an implementation that is wrong on these inputs.
        baseline: implementation that speed-ups refer to.
        flops, bytes: least work of the op; one of them is given and makes the share of the ceiling.
        parts: timed beside the others and computing less than the op (a bare product, a pass without scores), so never
            checked.
        in_place: implementations overwrite their inputs, which are restored before every call.
    """

    inputs: Inputs
    implementations: dict[str, Implementation]
    check: Callable[[Implementation], None]
    baseline: str
    flops: float = 0
    bytes: float = 0
    parts: dict[str, Implementation] = field(default_factory=dict)
    in_place: bool = False


@dataclass(frozen=True)
class Task:
    """One op at one shape.

    Attributes:
        op: name of the op.
        labels: what tells this task from others of the op, JSON-ready.
        prepare: makes operands; ``None`` for a task that measures itself.
        measure_itself: rows of such a task.
    """

    op: str
    labels: dict[str, Any]
    prepare: Callable[[], Prepared] | None = None
    measure_itself: Callable[[Ceilings], list[Row]] | None = None

    @property
    def name(self) -> str:
        """Words that ``--only`` looks into."""
        return " ".join([self.op, *(str(self.labels[key]) for key in _LABEL_ORDER if key in self.labels)])


def checked(prepared: Prepared) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Implementations that are right, and why the others are not."""
    right, wrong = {}, {}
    for name, implementation in prepared.implementations.items():
        try:
            prepared.check(implementation)
            right[name] = implementation
        except Exception as error:  # compilers and kernels raise what they like; any of it makes this one wrong
            wrong[name] = first_line(error)
    return right, wrong


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def run_task(task: Task, peak: Ceilings) -> list[Row]:
    """Rows of a task, one per implementation; one that is wrong has ``red``, the reason, instead of a time."""
    base = {"op": task.op, **task.labels}
    if task.measure_itself is not None:
        return [{**base, **row} for row in task.measure_itself(peak)]
    assert task.prepare is not None
    prepared = task.prepare()
    right, wrong = checked(prepared)
    restore = restorer(prepared.inputs) if prepared.in_place else None
    copies = None if restore else rotation(prepared.inputs)
    rows = [{**base, "implementation": name, "red": reason} for name, reason in wrong.items()]
    timed = measure_together({**right, **prepared.parts}, prepared.inputs, copies, prepare=restore)
    for name, result in timed.items():
        rate = rates(prepared.flops, prepared.bytes, result.median_ms, peak)
        rows.append({**base, "implementation": name, **asdict(result), **rate})
    return with_speedups(rows, prepared.baseline)


def rates(flops: float, moved: float, milliseconds: float, peak: Ceilings) -> Row:
    """TFLOP/s or GB/s, and the share of the ceiling measured in the same run."""
    if flops:
        tflops = flops / milliseconds / 1e9
        return {"tflops": tflops, "percent_of_matmul": 100 * tflops / peak.matmul_tflops}
    gbs = moved / milliseconds / 1e6
    return {"gbs": gbs, "percent_of_copy": 100 * gbs / peak.copy_gbs}


def with_speedups(rows: Sequence[Row], baseline: str) -> list[Row]:
    """The rows with ``speedup`` over the baseline, where both were timed."""
    times = {row["implementation"]: row["median_ms"] for row in rows if "median_ms" in row}
    reference = times.get(baseline)
    if reference is None:
        return list(rows)
    return [
        {**row, "baseline": baseline, "speedup": reference / row["median_ms"]} if "median_ms" in row else row
        for row in rows
    ]


def describe(row: Row) -> str:
    """One line of the table."""
    where = " ".join(str(row[key]) for key in ("model", "projection") if key in row)
    shape = f"{row['rows']} x {row['width']}" if "rows" in row else ""
    tokens = str(row.get("tokens", ""))
    what = row["implementation"]
    start = f"{row['op']:22s} {where:20s} {shape:>14s} {tokens:>6s}  {what:20s}"
    if "red" in row:
        return f"{start} WRONG, not timed: {row['red']}"
    if "gbs" in row:
        speed = f"{row['gbs']:7.0f} GB/s    {row['percent_of_copy']:5.1f} % of copy  "
    elif "tflops" in row:
        speed = f"{row['tflops']:7.1f} TFLOP/s {row['percent_of_matmul']:5.1f} % of matmul"
    else:
        speed = ""
    speedup = f"{row['speedup']:6.2f}x" if "speedup" in row else ""
    return f"{start} {row['median_ms']:9.4f} ms {speed} {speedup} {row['extra_bytes'] / 2**20:9.1f} MiB"


def random_matrix(*shape: int) -> torch.Tensor:
    """Normal random numbers, bfloat16 on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
