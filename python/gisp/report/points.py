"""Figures of the points of a run, drawn against decoder sparsity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from gisp.report.figures import figures
from gisp.report.style import LIGHT, MARKERS, Theme, new_figure, themed, to_png

# What is of one kind shares axes; figures of another kind (lm-eval has many) get axes of their own.
_SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match", "f1")
_PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")


def draw_points(points: Sequence[dict[str, Any]], theme: Theme = LIGHT) -> bytes:
    """PNG bytes: one pair of axes per kind of figure, bars for standard errors."""
    with themed(theme):
        return to_png(_draw(points, theme))


def _draw(points: Sequence[dict[str, Any]], theme: Theme) -> Figure:
    series: dict[str, list[tuple[float, float, float]]] = {}
    for point in points:
        for name, value, error in figures(point):
            if value is not None and math.isfinite(value):
                series.setdefault(name, []).append((point["sparsity"], value, error or 0.0))
    kinds = sorted({_kind(name) for name in series})
    figure = new_figure(3.9 * max(1, math.ceil(len(kinds) / 2)))
    columns = min(2, max(1, len(kinds)))
    grid = figure.subplots(max(1, math.ceil(len(kinds) / 2)), columns, squeeze=False).flatten()
    for ax, kind in zip(grid, kinds, strict=False):
        _axes(ax, kind, {name: values for name, values in series.items() if _kind(name) == kind}, theme)
    for ax in grid[len(kinds) :]:
        ax.set_visible(False)
    return figure


def _kind(name: str) -> str:
    metric = name.split(" ")[-1].split(",")[0]
    if metric in _SHARES:
        return "share of examples"
    return "perplexity" if metric in _PERPLEXITIES else metric


def _axes(ax: Axes, kind: str, series: dict[str, list[tuple[float, float, float]]], theme: Theme) -> None:
    for number, (name, values) in enumerate(series.items()):
        xs, ys, errors = zip(*values, strict=True)
        colour, marker = theme.series[number % len(theme.series)], MARKERS[number % len(MARKERS)]
        bars = errors if any(errors) else None
        ax.errorbar(xs, ys, yerr=bars, color=colour, marker=marker, markersize=5, capsize=3, label=name)
    heights = [y for values in series.values() for _, y, _ in values]
    if kind == "perplexity" and max(heights) > 4 * min(heights):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    ax.set_ylabel(kind)
    ax.set_xlabel("decoder sparsity")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.margins(y=0.08)
    ax.grid(axis="y")
    ax.legend(loc="best")
