"""Pictures of the study: perplexity over sparsity for every criterion, and what each part of ``fast`` is worth."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common.plots import THEME, series, write_figures
from benchmarks.quality.summary import LEAD, collect, tasks_of
from gisp.files import write_atomic
from gisp.report.style import MARKERS, new_figure, themed, to_png

Result = dict[str, Any]


def write_plots(result: Result, beside: Path) -> list[Path]:
    """PNGs beside a result; those it has figures for."""
    found = collect(result["cells"])
    criteria = {
        f"{name} + {extra}" if extra else name: values
        for (study, name, extra), values in found.items()
        if study == "criteria" and (not extra or (name == "fast" and extra in ("lsq", "kfac")))
    }
    parts = {name: values for (study, name, _), values in found.items() if study == "fast"}
    drawn: dict[str, Callable[[], Figure]] = {}
    if criteria:
        drawn["criteria"] = lambda: draw_criteria(criteria, result["dense"]["perplexity"])
    if parts:
        drawn["parts"] = lambda: draw_parts(parts)
    return write_figures(drawn, beside)


# The ways of the picture for readers, by what they are called there; the first ones a result has are drawn.
SHOWN = {
    ("fast", "lsq"): "fast + lsq",
    ("fast", "kfac"): "fast + kfac",
    ("fast", ""): "fast",
    ("paper", ""): "paper (GISP)",
    ("learned-gates", ""): "learned gates",
    ("flap", ""): "FLAP",
    ("wanda-sp", ""): "Wanda-SP",
    ("magnitude", ""): "magnitude",
}


def write_picture(result: Result, path: Path) -> None:
    """Perplexity and, where tasks were measured, the part of the lead over guessing that is left, by sparsity."""
    with themed(THEME):
        write_atomic(path, to_png(_picture(result)))


def _picture(result: Result) -> Figure:
    measures = {"perplexity": "perplexity", LEAD: "% of dense's lead over guessing, mean of tasks"}
    if not tasks_of(result["dense"]):
        del measures[LEAD]
    figure = new_figure(4.0)
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    for ax, (metric, label) in zip(axes, measures.items(), strict=True):
        scale = 100 if metric == LEAD else 1
        found = collect(result["cells"], metric)
        start = 100.0 if metric == LEAD else result["dense"]["perplexity"]
        for number, ((name, extra), shown) in enumerate(SHOWN.items()):
            values = found.get(("criteria", name, extra))
            if values:
                sizes = sorted(values)
                means = [scale * statistics.mean(values[size]) for size in sizes]
                marker = MARKERS[number % len(MARKERS)]
                ax.plot(
                    [0, *(100 * s for s in sizes)], [start, *means], label=shown, marker=marker, color=series(number)
                )
        ax.set_xlabel("decoder sparsity, %")
        ax.set_ylabel(label)
    axes[0].set_yscale("log")
    axes[0].legend()
    return figure


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
            color=series(number),
            linestyle="-" if number < len(THEME.series) else "--",
            capsize=2,
        )
    ax.axhline(dense, color=THEME.muted, linewidth=0.8, linestyle=":")
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
        colour = series(name == "as it is")
        ax.plot(values, [row] * len(values), "o", color=colour, alpha=0.7)
        ax.plot([statistics.mean(values)], [row], "|", color=THEME.ink, markersize=12)
    ax.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    ax.set_xlabel(f"perplexity at {100 * last:g} %")
    ax.set_title("Preset fast with one part changed")
    ax.grid(axis="x")
    return figure
