"""Goals of a whole run."""

from __future__ import annotations

from typing import Any

from benchmarks.common.goals import Goal

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


def _of(run: dict[str, Any] | None, key: str) -> float | None:
    value = None if run is None else run.get(key)
    return None if value is None else float(value)
