"""What the project set out to reach on one H200, and by how much a result meets or misses it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.common.command import table
from benchmarks.common.registry import DENSE, HALF, MIDWAY, REAL
from benchmarks.common.task import AUTO
from benchmarks.kernels.importance_tasks import CUBLAS, CUBLAS_EAGER, CUBLAS_OURS

Row = dict[str, Any]
MEBIBYTE = 2**20
GIGABYTE = 1e9


@dataclass(frozen=True)
class Goal:
    """One goal and what was measured.

    Attributes:
        what: the quantity.
        target, unit: to be reached.
        worst: measured on the worst shape; ``None`` where it was not measured.
        at_least: whether more is better.
        where: the worst shape.
        median: over all shapes.
    """

    what: str
    target: float
    unit: str
    worst: float | None
    at_least: bool = True
    where: str = ""
    median: float | None = None

    @property
    def met(self) -> bool | None:
        if self.worst is None:
            return None
        return self.worst >= self.target if self.at_least else self.worst <= self.target

    @property
    def margin(self) -> float | None:
        """By how much it is met (positive) or missed (negative), as a fraction of the target."""
        if self.worst is None:
            return None
        return (self.worst - self.target) / self.target * (1 if self.at_least else -1)


def goal_table(goals: Iterable[Goal]) -> str:
    """One line per goal."""
    lines = []
    for goal in goals:
        sign = ">=" if goal.at_least else "<="
        state = "not measured"
        if goal.met is not None and goal.margin is not None:
            state = f"{'met' if goal.met else 'MISSED'} by {100 * abs(goal.margin):.0f} %"
        lines.append(
            [
                goal.what,
                f"{sign} {goal.target:g} {goal.unit}",
                "-" if goal.worst is None else f"{goal.worst:.3g}",
                "-" if goal.median is None else f"{goal.median:.3g}",
                state,
                goal.where,
            ]
        )
    return table(("goal", "target", "worst", "median", "", "worst at"), lines)


def kernel_goals(rows: list[Row]) -> list[Goal]:
    """Goals of the kernels, on the shapes of the 13B and 8B with even widths."""
    wgrad = [row for row in rows if row["op"] in ("wgrad_importance", "stacked_wgrad") and _regular(row)]
    goals = []
    for tokens, over_eager in ((512, 2.2), (2048, 1.4), (8192, 1.2), (32768, 1.05)):
        here = [row for row in wgrad if row["tokens"] == tokens]
        goals.append(_ratio(f"scores, {tokens} tokens, over {CUBLAS_EAGER}", over_eager, here, CUBLAS_EAGER))
        if tokens == 512:
            goals.append(_ratio(f"scores, {tokens} tokens, over {CUBLAS_OURS}", 1.3, here, CUBLAS_OURS))
        if tokens >= 8192:
            goals.append(_ratio(f"scores, {tokens} tokens, speed of {CUBLAS}", 0.93, here, CUBLAS))
    reductions = [row for row in rows if row["op"] == "abs_weighted_reduce" and _regular(row)]
    steps = [row for row in rows if row["op"] == "partition_step" and row["model"] == "llama-2-13b"]
    packs = [row for row in rows if row["op"] == "pack"]
    return [
        *goals,
        _worst("abs_weighted_reduce, of copy", 85, "%", reductions, "percent_of_copy"),
        _worst("partition of the 13B, wall", 2, "ms", steps, "median_ms", at_least=False),
        _worst("partition of the 13B, extra memory", 1, "MiB", steps, _extra_mebibytes, at_least=False),
        _worst("pack(), of copy", 70, "%", packs, "percent_of_copy"),
    ]


def prune_goals(runs: list[Row]) -> list[Goal]:
    """Goals of a whole run: 200 steps of 8192 tokens to one half."""
    full = {run["model"]: run for run in runs if run.get("full")}
    large, small = full.get("llama-2-13b"), full.get("llama-3-8b")
    seconds, peak = _of(large, "seconds"), _of(large, "peak_bytes")
    return [
        Goal("13B importance pass, dense, of matmul", 75, "%", _of(large, "percent_of_matmul_dense")),
        Goal("13B importance pass, at the end, of matmul", 75, "%", _of(large, "percent_of_matmul_end")),
        Goal("13B to 50 %, whole loop", 180, "s", seconds, at_least=False),
        Goal("13B to 50 %, whole loop (aim)", 150, "s", seconds, at_least=False),
        Goal("13B to 50 %, peak memory", 60, "GB", None if peak is None else peak / GIGABYTE, at_least=False),
        Goal("8B to 50 %, whole loop", 120, "s", _of(small, "seconds"), at_least=False),
    ]


def infer_goals(models: list[Row]) -> list[Goal]:
    """Goals of inference at one half, on the 13B."""
    found = next((item["rows"] for item in models if item["model"] == "llama-2-13b"), [])
    half = next((row for row in found if row["asked"] == 0.5), None)
    dense = found[0] if found else None

    def ratio(of: Callable[[Row], float | None]) -> float | None:
        one, other = (None if row is None else of(row) for row in (dense, half))
        return one / other if one and other else None

    weights = ratio(lambda row: row["weight_bytes"])
    return [
        Goal("13B at 50 %, prefill over dense", 1.75, "x", ratio(lambda row: row["prefill_ms"])),
        Goal("13B at 50 %, decode of batch 1 over dense", 1.5, "x", ratio(lambda row: row["decode_ms"].get("1"))),
        Goal("13B at 50 %, weights of dense", 0.53, "", None if weights is None else 1 / weights, at_least=False),
    ]


def _of(run: Row | None, key: str) -> float | None:
    value = None if run is None else run.get(key)
    return None if value is None else float(value)


def _regular(row: Row) -> bool:
    """Whether a row counts: a real model at an aligned width."""
    widths = (row["rows"], row["width"])
    return row["model"] in REAL and row["kept"] in (DENSE, MIDWAY, HALF) and all(width % 16 == 0 for width in widths)


def _shape(row: Row) -> str:
    parts = [str(row["model"]), str(row.get("projection", ""))]
    if "rows" in row:
        parts.append(f"{row['rows']}x{row['width']}")
    return " ".join(part for part in parts if part)


def _ratio(what: str, target: float, rows: list[Row], baseline: str) -> Goal:
    """Time of ``baseline`` over that of the library's choice, shape by shape."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if "median_ms" in row:
            times.setdefault((row["op"], _shape(row)), {})[row["implementation"]] = row["median_ms"]
    found = [(t[baseline] / t[AUTO], where) for (_, where), t in times.items() if baseline in t and AUTO in t]
    return _summary(what, target, "x", found, True)


def _worst(
    what: str, target: float, unit: str, rows: list[Row], key: str | Callable[[Row], float], at_least: bool = True
) -> Goal:
    ours = [row for row in rows if row["implementation"] == AUTO and "median_ms" in row]
    return _summary(what, target, unit, [(_value(row, key), _shape(row)) for row in ours], at_least)


def _value(row: Row, key: str | Callable[[Row], float]) -> float:
    return float(row[key]) if isinstance(key, str) else key(row)


def _extra_mebibytes(row: Row) -> float:
    return float(row["extra_bytes"]) / MEBIBYTE


def _summary(what: str, target: float, unit: str, found: list[tuple[float, str]], at_least: bool) -> Goal:
    if not found:
        return Goal(what, target, unit, None, at_least)
    worst, where = min(found) if at_least else max(found)
    return Goal(what, target, unit, worst, at_least, where, statistics.median(value for value, _ in found))
