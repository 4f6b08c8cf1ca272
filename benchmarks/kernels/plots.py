"""Pictures of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.common.plots import THEME, series, short, write_figures
from benchmarks.common.registry import DENSE, EVEN_WIDTH, HALF, ODD_WIDTH
from benchmarks.common.task import AUTO, COMPILED, EAGER, Row
from benchmarks.kernels.tasks.importance import CUBLAS, CUBLAS_COMPILED, CUBLAS_EAGER, CUBLAS_OURS
from gisp.report.style import new_figure

# Implementations in order of importance: label, place in the theme's series, marker.
_SCORES = {
    AUTO: ("GISP", 1, "o"),
    CUBLAS: ("cuBLAS alone (no scores)", 3, "D"),
    CUBLAS_OURS: ("cuBLAS + our reduction", 2, "s"),
    CUBLAS_COMPILED: ("cuBLAS + torch.compile", 4, "^"),
    CUBLAS_EAGER: ("cuBLAS + eager", 0, "v"),
}
_MEMORY = {AUTO: ("GISP", 1, "o"), COMPILED: ("torch.compile", 4, "^"), EAGER: ("eager", 0, "v")}
_INCH_PER_LINE = 0.24


def write_plots(result: dict[str, Any], beside: Path) -> list[Path]:
    """Pictures of a kernel result; those it has rows for."""
    rows = [row for row in result["rows"] if "median_ms" in row]
    # Beside odd widths, where cuBLAS is several times slower, no other difference would be seen.
    usual = [row for row in rows if not {row.get("rows"), row.get("width")} & {ODD_WIDTH, EVEN_WIDTH}]
    scores = [row for row in usual if row["op"] == "wgrad_importance" and row["kept"] in (DENSE, HALF)]
    memory = [row for row in usual if "percent_of_copy" in row and row["op"] not in ("pack", "partition_step")]
    reductions = [row for row in memory if row["op"] in ("abs_weighted_reduce", "layer_reduce")]
    elementwise = [row for row in memory if row not in reductions]
    drawn: dict[str, Callable[[], Figure]] = {}
    if scores:
        drawn["scores"] = lambda: draw_scores(scores)
    if reductions:
        drawn["reduction"] = lambda: draw_memory(reductions, "Sum of |W * G| by structure")
    if elementwise:
        drawn["elementwise"] = lambda: draw_memory(elementwise, "Elementwise parts of a decoder layer")
    return write_figures(drawn, beside)


def draw_scores(rows: Sequence[Row]) -> Figure:
    """Speed-up over cuBLAS and an eager reduction, a panel per token count, a line per shape."""
    tokens = sorted({row["tokens"] for row in rows})
    shapes = list(dict.fromkeys(_shape(row) for row in sorted(rows, key=_order)))
    figure = new_figure(1.6 + _INCH_PER_LINE * len(shapes))
    axes = figure.subplots(1, len(tokens), sharey=True, squeeze=False)[0]
    for ax, count in zip(axes, tokens, strict=True):
        here = [row for row in rows if row["tokens"] == count and "speedup" in row]
        _dots(ax, here, shapes, _SCORES, "speedup")
        ax.axvline(1, color=THEME.muted, linewidth=1)
        ax.set_title(f"{count:,} tokens")
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, 0.9), high + 0.28 * (high - low))
        _at_right(ax, here, shapes, "percent_of_matmul")
        ax.xaxis.set_major_locator(MaxNLocator(4))
    figure.supxlabel(
        "speed-up over cuBLAS + eager reduction; at the right: % of the 8192³ product GISP reaches", fontsize=10
    )
    _legend(figure, axes[0])
    return figure


def draw_memory(rows: Sequence[Row], title: str) -> Figure:
    """Share of the copy bandwidth, a line per op and shape, and the speed-up over eager."""
    shapes = list(dict.fromkeys(_shape(row) for row in sorted(rows, key=_order)))
    figure = new_figure(1.7 + _INCH_PER_LINE * len(shapes))
    ax = figure.subplots()
    _dots(ax, rows, shapes, _MEMORY, "percent_of_copy")
    highest = max(100.0, *(row["percent_of_copy"] for row in rows))
    ax.axvline(100, color=THEME.muted, linewidth=1)
    ax.set_xlim(0, 1.12 * highest)
    ours = {_shape(row): row for row in rows if row["implementation"] == AUTO}
    for y, shape in enumerate(shapes):
        if shape in ours and "speedup" in ours[shape]:
            _note(ax, 1.12 * highest, y, f"{ours[shape]['speedup']:.1f}x")
    ax.set_title(title)
    ax.set_xlabel("% of copy bandwidth (fewest possible bytes over time); at the right: GISP over eager")
    _legend(figure, ax)
    return figure


def _dots(
    ax: Axes, rows: Sequence[Row], shapes: Sequence[str], style: dict[str, tuple[str, int, str]], key: str
) -> None:
    """A dot per shape and implementation; ours are drawn last, over the others."""
    places = {shape: y for y, shape in enumerate(shapes)}
    for name, (label, colour, marker) in style.items():
        here = [row for row in rows if row["implementation"] == name]
        xs, ys = [row[key] for row in here], [places[_shape(row)] for row in here]
        size = 6.5 if name == AUTO else 5
        order = 4 if name == AUTO else 3
        line: dict[str, Any] = {"linestyle": "none", "marker": marker, "markersize": size, "zorder": order}
        ax.plot(xs, ys, color=series(colour), label=label, markeredgecolor=THEME.surface, markeredgewidth=0.6, **line)
    ax.set_yticks(range(len(shapes)), shapes, fontsize=8)
    ax.set_ylim(len(shapes) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="both")


def _at_right(ax: Axes, rows: Sequence[Row], shapes: Sequence[str], key: str) -> None:
    right = ax.get_xlim()[1]
    ours = {_shape(row): row[key] for row in rows if row["implementation"] == AUTO}
    for y, shape in enumerate(shapes):
        if shape in ours:
            _note(ax, right, y, f"{ours[shape]:.0f} %")


def _note(ax: Axes, x: float, y: float, text: str) -> None:
    """A figure at the right end of a line, not struck through by the grid."""
    box = {"facecolor": THEME.surface, "edgecolor": "none", "pad": 1.0}
    ax.text(x, y, text, ha="right", va="center", fontsize=8, color=THEME.ink, bbox=box)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), columnspacing=1.2, handletextpad=0.3)


def _order(row: Row) -> tuple[Any, ...]:
    return (-float(row.get("kept", 1)), str(row["model"]))


def _shape(row: Row) -> str:
    what = row.get("projection") or row["op"].rstrip("_")
    if "rows" in row:
        return f"{short(row)} {what} {row['rows']}x{row['width']}"
    # Activations of so many tokens, or all matrices of a layer.
    extents = [f"{row['tokens']}x{row['width']}"] if "tokens" in row else [f"{row['kept']:.0%} kept"]
    return " ".join([short(row), what, *extents])
