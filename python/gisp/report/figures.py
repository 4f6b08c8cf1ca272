"""What of an evaluation is shown in tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def figures(point: dict[str, Any]) -> Iterator[tuple[str, float | None, float | None]]:
    """Name, value and standard error of everything measured at a point that is to be shown."""
    for name in ("perplexity", "acc", "acc_norm", "exact_match"):
        if name in point:
            yield name, point[name], point.get(f"{name}_stderr")
    for task, metrics in point.get("lm_eval", {}).items():
        for name, value in metrics.items():
            if "_stderr" not in name:
                metric, comma, filter_name = name.partition(",")
                yield f"{task} {name}", value, metrics.get(f"{metric}_stderr{comma}{filter_name}")
