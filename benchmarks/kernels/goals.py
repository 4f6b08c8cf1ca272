"""Goals of the kernels."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.common.compare import Ratios, of_times
from benchmarks.common.goals import Goal
from benchmarks.common.registry import DENSE, HALF, MIDWAY, REAL
from benchmarks.common.task import AUTO, COMPILED, Row
from benchmarks.kernels.tasks.gates import TOKENS as GATE_TOKENS
from benchmarks.kernels.tasks.importance import CUBLAS, CUBLAS_EAGER, CUBLAS_OURS

MEBIBYTE = 2**20
# Names of what was measured of a task, and parts of further such names.
_MEASURED = {"implementation", "red", "baseline", "speedup", "tflops", "gbs", "repetitions", "structures"}
_MEASURED_PARTS = ("_ms", "_bytes", "_moved", "percent_")


def kernel_ratios(result: dict[str, Any]) -> Ratios:
    """Speed of ours over the baseline of every task."""
    timed = {(_task(row), row["implementation"]): row for row in result["rows"] if "median_ms" in row}
    return {
        f"{name}, over {row['baseline']}": of_times(row, timed[name, row["baseline"]])
        for (name, implementation), row in timed.items()
        if implementation == AUTO and "speedup" in row
    }


def _task(row: Row) -> str:
    """The op and everything that was not measured."""
    told = [key for key in row if key not in _MEASURED and not any(part in key for part in _MEASURED_PARTS)]
    return " ".join(str(row[key]) for key in told)


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
    layers = [row for row in rows if row["op"] == "layer_reduce"]
    gates = {n: [row for row in rows if row["op"] == "gate_grads" and row["tokens"] == n] for n in GATE_TOKENS}
    steps = [row for row in rows if row["op"] == "partition_step" and row["model"] == "llama-2-13b"]
    packs = [row for row in rows if row["op"] == "pack"]
    return [
        *goals,
        _worst("abs_weighted_reduce, of copy", 85, "%", reductions, "percent_of_copy"),
        *(_ratio(f"gate gradients, {n} tokens, over torch.compile", 1.1, gates[n], COMPILED) for n in gates),
        _worst("gate gradients, 8192 tokens, of copy", 85, "%", gates[8192], "percent_of_copy"),
        _worst("reduction of a layer at once, of copy", 88, "%", layers, "percent_of_copy"),
        _worst("partition of the 13B, wall", 2, "ms", steps, "median_ms", at_least=False),
        _worst("partition of the 13B, extra memory", 1, "MiB", steps, _extra_mebibytes, at_least=False),
        _worst("pack(), of copy", 70, "%", packs, "percent_of_copy"),
    ]


def _regular(row: Row) -> bool:
    """Whether a row counts: a real model at an aligned width."""
    widths = (row["rows"], row["width"])
    return row["model"] in REAL and row["kept"] in (DENSE, MIDWAY, HALF) and all(width % 16 == 0 for width in widths)


def _shape(row: Row) -> str:
    parts = [str(row["model"]), str(row.get("projection", ""))]
    if "rows" in row:
        parts.append(f"{row['rows']}x{row['width']}")
    elif "kept" in row:
        parts.append(f"{row['kept']:.0%} kept")
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
