"""Goals of a whole run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common.compare import Ratio, Ratios
from benchmarks.common.goals import Goal
from benchmarks.common.measure import quartiles
from benchmarks.prune.measure import window_rows

GIGABYTE = 1e9


def prune_goals(runs: list[dict[str, Any]]) -> list[Goal]:
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


def prune_ratios(result: dict[str, Any]) -> Ratios:
    """Speed of the importance pass over the paper's way, and its share of the ceiling; noise is that of the steps."""
    found: Ratios = {}
    for run in result["runs"]:
        if "error" in run:
            continue
        name = f"{run['model']} {run.get('criterion', 'gisp')}{' fp8' if run.get('fp8') else ''}"
        dense, end = window_rows(run["step_rows"])
        if run.get("paper"):
            found[f"{name}, over the paper's way"] = _ratio(
                dense, "tokens_per_second", run["paper"]["tokens_per_second"]
            )
        if run.get("ceilings"):
            found[f"{name}, of matmul, dense"] = _ratio(dense, "percent_of_matmul", 100)
            found[f"{name}, of matmul, at the end"] = _ratio(end, "percent_of_matmul", 100)
    for run in result.get("replicas", []):
        plain = next(r for r in result["replicas"] if r["model"] == run["model"] and r["slices"] is None)
        if run is not plain and "step_quartiles_dense" in run and "step_quartiles_dense" in plain:
            (low, high), (first, third) = plain["step_quartiles_dense"], run["step_quartiles_dense"]
            value = plain["step_seconds_dense"] / run["step_seconds_dense"]
            found[f"{run['model']} on {run['gpus']} GPUs, dense step"] = Ratio(value, low / third, high / first)
    for run in result.get("offload", []):
        if run.get("offloaded") and run.get("resident"):
            (low, high), value = _dense_step(run["resident"])
            (first, third), own = _dense_step(run["offloaded"])
            found[f"{run['model']} offloaded, dense step"] = Ratio(value / own, low / third, high / first)
    return found


def _dense_step(run: dict[str, Any]) -> tuple[tuple[float, float], float]:
    """Quartiles and median of the seconds of a step."""
    seconds = [row["step_seconds"] for row in window_rows(run["step_rows"])[0]]
    return quartiles(seconds), statistics.median(seconds)


def _ratio(rows: Sequence[dict[str, Any]], key: str, baseline: float) -> Ratio:
    values = [row[key] / baseline for row in rows]
    return Ratio(statistics.median(values), *quartiles(values))


def _of(run: dict[str, Any] | None, key: str) -> float | None:
    value = None if run is None else run.get(key)
    return None if value is None else float(value)
