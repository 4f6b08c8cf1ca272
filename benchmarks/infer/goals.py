"""Goals of inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common.compare import Ratios, of_times
from benchmarks.common.goals import Goal

Row = dict[str, Any]


def infer_ratios(result: dict[str, Any]) -> Ratios:
    """Speed of every size over the dense model."""
    found: Ratios = {}
    for item in result["models"]:
        dense, *pruned = item["rows"]
        for row in pruned:
            for what, times in row.get("times", {}).items():
                found[f"{item['model']} at {row['asked']:g}, {what}"] = of_times(times, dense["times"][what])
    return found


def infer_goals(models: list[Row]) -> list[Goal]:
    """Goals of inference at one half, on the 13B."""
    found: list[Row] = next((item["rows"] for item in models if item["model"] == "llama-2-13b"), [])
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
