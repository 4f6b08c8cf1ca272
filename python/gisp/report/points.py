"""What was measured on points of runs, drawn against decoder sparsity: one pair of axes per kind of figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gisp.report.style import LIGHT, Theme, draw_lines, log_where_wide, new_panels, sparsity_axis, themed, to_png
from gisp.run.evaluations import Evaluation, figures, method_text

# What is of one kind shares axes; figures of another kind (lm-eval has many) get axes of their own.
_SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match", "f1")
_PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")
_FIRST = ("perplexity", "share of examples")
# Figure's name, line's label, sparsity, value, standard error.
_Dot = tuple[str, str, float, float, float]


def draw_points(points: Sequence[dict[str, Any]], theme: Theme = LIGHT) -> bytes:
    """PNG bytes of the points of one run; bars for standard errors."""
    dots = [
        (name, name, point["sparsity"], value, error or 0.0)
        for point in points
        for name, value, error in figures(point)
        if value is not None and math.isfinite(value)
    ]
    with themed(theme):
        return to_png(_draw(dots, theme))


def draw_evaluations(evaluations: Sequence[Evaluation], theme: Theme) -> Figure:
    """Every evaluated point of a run and of what it is compared with; bars for standard errors.

    Points that were measured under other conditions are no points of the same line.
    """
    labels = _Labels(evaluations)
    dots = [
        (name, labels.of(evaluation, name), evaluation.sparsity, value, error or 0.0)
        for evaluation in evaluations
        for name, value, error in evaluation.figures
        if value is not None
    ]
    return _draw(dots, theme)


def has_points(evaluations: Iterable[Evaluation]) -> bool:
    """Whether there is anything to draw."""
    return any(figure.value is not None for evaluation in evaluations for figure in evaluation.figures)


class _Labels:
    """Names of lines, which say no more than what tells them apart."""

    def __init__(self, evaluations: Sequence[Evaluation]) -> None:
        self._sources = len({e.source for e in evaluations}) > 1
        self._conditions = len({(e.source, e.conditions) for e in evaluations}) > len({e.source for e in evaluations})

    def of(self, evaluation: Evaluation, name: str) -> str:
        parts = [method_text(evaluation)]
        if _kind(name) != name:
            parts.append(name)
        if self._sources and evaluation.data:
            parts.append(evaluation.source)
        if self._conditions and evaluation.conditions:
            parts.append(evaluation.conditions)
        return ", ".join(parts)


def _draw(dots: Sequence[_Dot], theme: Theme) -> Figure:
    kinds: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for name, label, *place in dots:
        kinds.setdefault(_kind(name), {}).setdefault(label, []).append((place[0], place[1], place[2]))
    order = sorted(kinds, key=lambda kind: (_FIRST.index(kind) if kind in _FIRST else len(_FIRST), kind))
    figure, axes = new_panels(max(1, len(order)), 3.9, theme)
    for ax, kind in zip(axes, order, strict=False):
        _axes(ax, kind, kinds[kind], theme)
    return figure


def _kind(name: str) -> str:
    metric = name.split(" ")[-1].split(",")[0]
    if metric in _SHARES:
        return "share of examples"
    return "perplexity" if metric in _PERPLEXITIES else metric


def _axes(ax: Axes, kind: str, series: dict[str, list[tuple[float, float, float]]], theme: Theme) -> None:
    draw_lines(ax, series, theme)
    log = kind == "perplexity" and log_where_wide(ax, [y for values in series.values() for _, y, _ in values])
    ax.set_title(f"{kind[:1].upper()}{kind[1:]}" + (" (log scale)" if log else ""))
    ax.set_ylabel(kind)
    sparsity_axis(ax)
    ax.legend(loc="best")
