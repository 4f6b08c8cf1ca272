"""Goals of scores inside somebody else's backward pass, and their ratios."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.common.compare import Ratios, of_times
from benchmarks.common.goals import Goal
from benchmarks.common.task import Row
from benchmarks.embed.ways import GATE_GRADIENTS, GATE_PARAMETERS, PASS, STREAM

GIGABYTE = 1e9
FEW_TOKENS = 2048


def embed_ratios(result: dict[str, Any]) -> Ratios:
    """Speed of our ways over every way that makes the same scores."""
    found: Ratios = {}
    for place, rows in _places(result["rows"]).items():
        for ours in (rows[name] for name in (STREAM, GATE_GRADIENTS) if name in rows):
            for name, other in rows.items():
                if other is not ours and other.get("baseline") == ours.get("baseline"):
                    found[f"{place}, {ours['way']} over {name}"] = of_times(ours, other)
    return found


def embed_goals(rows: list[Row]) -> list[Goal]:
    """Goals on every model and token count measured."""
    places = _places(rows)

    def goal(what: str, target: float, unit: str, values: dict[str, float], at_least: bool) -> Goal:
        if not values:
            return Goal(what, target, unit, None, at_least)
        where = (min if at_least else max)(values, key=lambda place: values[place])
        return Goal(what, target, unit, values[where], at_least, where, statistics.median(values.values()))

    def speedups(way: str, tokens: int | None) -> dict[str, float]:
        found = {place: rows[way] for place, rows in places.items() if "speedup" in rows.get(way, {})}
        return {place: row["speedup"] for place, row in found.items() if tokens is None or row["tokens"] <= tokens}

    def above_pass(way: str, tokens: int | None) -> dict[str, float]:
        """The same of the time that scoring adds to a pass."""
        found = {}
        for place, rows_here in places.items():
            row, alone = rows_here.get(way, {}), rows_here.get(PASS)
            if alone and "speedup" in row and (tokens is None or row["tokens"] <= tokens):
                added, other = (rows_here[name]["median_ms"] - alone["median_ms"] for name in (way, row["baseline"]))
                # A way that costs nothing that can be measured has no ratio.
                if added > 0:
                    found[place] = other / added
        return found

    extra = {place: {way: row["extra_bytes"] for way, row in rows.items()} for place, rows in places.items()}
    stream = {place: found[STREAM] / GIGABYTE for place, found in extra.items() if found.get(STREAM) is not None}
    both = {place: (found.get(GATE_GRADIENTS), found.get(GATE_PARAMETERS)) for place, found in extra.items()}
    more = {place: (a - b) / GIGABYTE for place, (a, b) in both.items() if a is not None and b is not None}
    return [
        goal(f"scores over .grad, to {FEW_TOKENS} tokens", 2.5, "x", speedups(STREAM, FEW_TOKENS), True),
        goal("the same, time above the pass", 2.5, "x", above_pass(STREAM, FEW_TOKENS), True),
        goal("scores, memory above the pass", 0.1, "GB", stream, False),
        goal("gate gradients over gate parameters", 1.3, "x", speedups(GATE_GRADIENTS, None), True),
        goal("the same, time above the pass", 1.3, "x", above_pass(GATE_GRADIENTS, None), True),
        goal("gate gradients, memory above gate parameters", 0.0, "GB", more, False),
    ]


def _places(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Timed rows by model and tokens, then by way."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "median_ms" in row:
            found.setdefault(f"{row['model']} {row['tokens']}", {})[row["way"]] = row
    return found
