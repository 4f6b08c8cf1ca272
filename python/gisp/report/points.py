"""Figures of the points of a run, drawn against decoder sparsity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gisp.report.figures import figures
from gisp.report.style import LIGHT, Theme, draw_lines, log_where_wide, new_figure, sparsity_axis, themed, to_png

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
    draw_lines(ax, series, theme)
    if kind == "perplexity":
        log_where_wide(ax, [y for values in series.values() for _, y, _ in values])
    ax.set_ylabel(kind)
    sparsity_axis(ax)
    ax.legend(loc="best")
