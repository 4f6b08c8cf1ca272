"""The study's tables: mean and spread over seeds, and what they say of the claims made for ``fast``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.common.command import table
from benchmarks.quality.cells import STUDIES

Result = dict[str, Any]
Key = tuple[str, str, str]
LEAD = "lead kept"


def key(cell: Result) -> str:
    """Names a cell in a result."""
    return f"{cell['study']}/{cell['name']}/{cell['seed']}"


def tasks_of(dense: Result) -> list[str]:
    """Names of the tasks that accuracy was measured on."""
    return [name.removeprefix("chance ") for name in dense if name.startswith("chance ")]


def lead_kept(dense: Result, point: Result) -> float | None:
    """(acc - chance) / (dense acc - chance), each the mean over choice tasks; ``None`` without a lead to keep.

    Means come first: a task whose dense accuracy is close to guessing would outweigh all others in a mean of shares.
    """
    tasks = [task for task in tasks_of(dense) if dense[f"chance {task}"] > 0 and f"acc {task}" in point]
    if not tasks:
        return None
    chance = statistics.mean(dense[f"chance {task}"] for task in tasks)
    best, found = (statistics.mean(figures[f"acc {task}"] for task in tasks) for figures in (dense, point))
    return (found - chance) / (best - chance) if best > chance else None


def with_leads(result: Result) -> Result:
    """A result whose points also hold ``lead kept``."""
    dense = result["dense"]
    cells = [
        {**cell, "points": [{**point, LEAD: lead_kept(dense, point)} for point in cell.get("points", [])]}
        for cell in result["cells"]
    ]
    return {**result, "cells": cells}


def compensation_name(options: dict[str, Any] | None) -> str:
    """A short name of compensation options."""
    if not options:
        return ""
    rest = [f"{name} {value}" for name, value in options.items() if name != "method"]
    return " ".join([options["method"], *rest])


def collect(cells: Iterable[Result], metric: str = "perplexity") -> dict[Key, dict[float, list[float]]]:
    """Values over seeds: (study, way, compensation) -> sparsity asked for -> values."""
    found: dict[Key, dict[float, list[float]]] = {}
    for cell in cells:
        for point in cell.get("points", []):
            if point.get(metric) is None:
                continue
            key = (cell["study"], cell["name"], compensation_name(point["compensation"]))
            found.setdefault(key, {}).setdefault(point["asked"], []).append(point[metric])
    return found


def spend(cells: Iterable[Result]) -> dict[tuple[str, str], tuple[int, float]]:
    """Calibration tokens and seconds of a whole run by (study, way), median over seeds."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for cell in cells:
        points = cell.get("points", [])
        if points:
            found.setdefault((cell["study"], cell["name"]), []).append(
                (points[-1]["tokens"], max(point["seconds"] for point in points))
            )
    return {
        key: (int(statistics.median(t for t, _ in values)), statistics.median(s for _, s in values))
        for key, values in found.items()
    }


def cell_text(values: list[float]) -> str:
    """Mean and, of several, the spread (highest less lowest)."""
    mean = statistics.mean(values)
    digits = 2 if mean >= 1 else 3
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({max(values) - min(values):.{digits}f})"


def show(result: Result, study: str, metric: str = "perplexity") -> str:
    """The table of one study, best at the highest sparsity first."""
    found = {key: values for key, values in collect(result["cells"], metric).items() if key[0] == study}
    sparsities = sorted({sparsity for values in found.values() for sparsity in values})
    if not sparsities:
        return ""
    costs = spend(result["cells"])
    sign = 1 if metric.startswith("perplexity") else -1

    def worst(item: tuple[Key, dict[float, list[float]]]) -> float:
        return sign * statistics.mean(item[1].get(sparsities[-1], [float("inf") * sign]))

    lines = []
    for (_, name, compensation), values in sorted(found.items(), key=worst):
        tokens, seconds = costs[(study, name)]
        lines.append(
            [
                f"{name} + {compensation}" if compensation else name,
                *(cell_text(values[sparsity]) if sparsity in values else "-" for sparsity in sparsities),
                f"{tokens:,}",
                f"{seconds:.1f}",
                str(max(len(each) for each in values.values())),
            ]
        )
    header = (f"{study}: {metric}", *(f"{100 * s:g} %" for s in sparsities), "tokens", "seconds", "seeds")
    return table(header, lines)


def report(result: Result) -> str:
    """The tables of all studies, by every measure, and the verdicts."""
    full = with_leads(result)
    tasks = [f"acc {task}" for task in tasks_of(result["dense"])]
    others = [name for name in result["dense"] if name.startswith("perplexity ")][1:]
    shown = [show(full, study, metric) for metric in ("perplexity", *others, LEAD, *tasks) for study in STUDIES]
    failed = [f"{key(cell)}: {cell['error']}" for cell in result["cells"] if "error" in cell]
    return "\n".join([*filter(None, shown), *verdicts(result), *failed])


def verdicts(result: Result) -> list[str]:
    """What the table says of each claim, one line each; claims it has no figures for are left out."""
    found = collect(result["cells"])
    dense = result["dense"].get("perplexity", float("nan"))
    lines = []
    plain = {name: values for (study, name, extra), values in found.items() if study == "criteria" and not extra}
    fast = plain.get("fast", {})
    for sparsity in sorted(fast):
        mean = statistics.mean(fast[sparsity])
        # Not among its rivals: fast with another option.
        rivals = {name: values for name, values in plain.items() if not name.startswith("fast") and sparsity in values}
        others = {name: statistics.mean(values[sparsity]) for name, values in rivals.items()}
        if others:
            best = min(others, key=lambda name: others[name])
            place = 1 + sum(value < mean for value in others.values())
            lines.append(
                f"{100 * sparsity:g} %: fast is number {place} of {len(others) + 1} ({mean:.2f}); "
                f"best of the others: {best} ({others[best]:.2f})"
            )
    lines += _against_exact(result, plain)
    for (study, name, extra), values in found.items():
        if study != "criteria" or not extra or name not in plain:
            continue
        for sparsity in sorted(values):
            before = statistics.mean(plain[name][sparsity])
            after = statistics.mean(values[sparsity])
            share = (before - after) / (before - dense) if before > dense else float("nan")
            lines.append(
                f"{100 * sparsity:g} %: {name} + {extra} removes {100 * share:.0f} % of the excess perplexity "
                f"({before:.2f} to {after:.2f}, dense {dense:.2f})"
            )
    return lines


def _against_exact(result: Result, plain: dict[str, dict[float, list[float]]]) -> list[str]:
    """``fast`` beside the exact schedules at the highest sparsity, with the tokens each spent."""
    costs = spend(result["cells"])
    lines = []
    for name, values in plain.items():
        if not name.startswith(("paper", "official")) or "fast" not in plain:
            continue
        last = max(values)
        mine, other = statistics.mean(plain["fast"].get(last, [float("nan")])), statistics.mean(values[last])
        tokens, exact = costs[("criteria", "fast")][0], costs[("criteria", name)][0]
        lines.append(
            f"{100 * last:g} %: fast {mine:.2f} on {tokens:,} tokens, {name} {other:.2f} on {exact:,} "
            f"({100 * tokens / exact:.1f} % of them)"
        )
    return lines
