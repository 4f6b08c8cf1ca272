"""Pictures of the study: perplexity over sparsity for every criterion, and what each part of ``fast`` is worth."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.quality.summary import collect
from gisp.files import write_atomic
from gisp.report.style import LIGHT, MARKERS, new_figure, themed, to_png

Result = dict[str, Any]


def write_plots(result: Result, beside: Path) -> list[Path]:
    """PNGs beside a result; those it has figures for."""
    found = collect(result["cells"])
    paths = []
    with themed(LIGHT):
        criteria = {n: v for (study, n, extra), v in found.items() if study == "criteria" and not extra}
        criteria |= {
            f"{n} + {extra}": v
            for (study, n, extra), v in found.items()
            if study == "criteria" and extra in ("lsq", "kfac") and n == "fast"
        }
        parts = {name: values for (study, name, _), values in found.items() if study == "fast"}
        for name, figure in (
            ("criteria", draw_criteria(criteria, result["dense"]["perplexity"]) if criteria else None),
            ("parts", draw_parts(parts) if parts else None),
        ):
            if figure is not None:
                path = beside.with_name(f"{beside.stem}-{name}.png")
                write_atomic(path, to_png(figure))
                paths.append(path)
    return paths


def draw_criteria(ways: dict[str, dict[float, list[float]]], dense: float) -> Figure:
    """Mean perplexity over sparsity on a logarithmic axis, one line per way, bars from lowest to highest seed."""
    figure = new_figure(5.0)
    ax = figure.subplots()
    last = max(s for values in ways.values() for s in values)
    ordered = sorted(ways.items(), key=lambda item: statistics.mean(item[1].get(last, [float("inf")])))
    for number, (name, values) in enumerate(ordered):
        points = sorted(values.items())
        means = [statistics.mean(v) for _, v in points]
        spread = [
            [m - min(v) for m, (_, v) in zip(means, points, strict=True)],
            [max(v) - m for m, (_, v) in zip(means, points, strict=True)],
        ]
        ax.errorbar(
            [100 * s for s, _ in points],
            means,
            yerr=spread,
            label=name,
            marker=MARKERS[number % len(MARKERS)],
            color=LIGHT.series[number % len(LIGHT.series)],
            linestyle="-" if number < len(LIGHT.series) else "--",
            capsize=2,
        )
    ax.axhline(dense, color=LIGHT.muted, linewidth=0.8, linestyle=":")
    ax.set_yscale("log")
    ax.set_xlabel("decoder sparsity, %")
    ax.set_ylabel("perplexity (dotted: dense)")
    ax.set_title("Ways of pruning")
    ax.legend(ncols=2)
    return figure


def draw_parts(parts: dict[str, dict[float, list[float]]]) -> Figure:
    """Perplexity at the highest sparsity of every variant of ``fast``, a dot per seed."""
    last = max(s for values in parts.values() for s in values)
    ordered = sorted(((n, v[last]) for n, v in parts.items() if last in v), key=lambda item: -statistics.mean(item[1]))
    figure = new_figure(1.2 + 0.24 * len(ordered))
    ax = figure.subplots()
    for row, (name, values) in enumerate(ordered):
        colour = LIGHT.series[1] if name == "as it is" else LIGHT.series[0]
        ax.plot(values, [row] * len(values), "o", color=colour, alpha=0.7)
        ax.plot([statistics.mean(values)], [row], "|", color=LIGHT.ink, markersize=12)
    ax.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    ax.set_xlabel(f"perplexity at {100 * last:g} %")
    ax.set_title("Preset fast with one part changed")
    ax.grid(axis="x")
    return figure
