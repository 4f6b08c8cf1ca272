"""Pictures of benchmark results, written beside the JSON they are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchmarks.common.registry import DENSE, EVEN_WIDTH, HALF, ODD_WIDTH
from benchmarks.common.task import AUTO, COMPILED, EAGER
from benchmarks.kernels.importance_tasks import CUBLAS, CUBLAS_COMPILED, CUBLAS_EAGER, CUBLAS_OURS
from gisp.files import write_atomic
from gisp.report.style import LIGHT, MARKERS, Theme, new_figure, themed, to_png
from gisp.run.metrics import PHASES

Row = dict[str, Any]
_THEME = LIGHT
_SHORT = {"llama-2-13b": "13B", "llama-3-8b": "8B", "tiny": "tiny"}
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


def write_kernel_plots(result: dict[str, Any], beside: Path) -> list[Path]:
    """Pictures of a kernel result; those it has rows for."""
    rows = [row for row in result["rows"] if "median_ms" in row]
    # Beside odd widths, where cuBLAS is several times slower, no other difference would be seen.
    usual = [row for row in rows if not {row.get("rows"), row.get("width")} & {ODD_WIDTH, EVEN_WIDTH}]
    scores = [row for row in usual if row["op"] == "wgrad_importance" and row["kept"] in (DENSE, HALF)]
    memory = [row for row in usual if "percent_of_copy" in row and row["op"] not in ("pack", "partition_step")]
    reductions = [row for row in memory if row["op"] == "abs_weighted_reduce"]
    elementwise = [row for row in memory if row["op"] != "abs_weighted_reduce"]
    drawn: list[tuple[str, Callable[[], Figure]]] = []
    if scores:
        drawn.append(("scores", lambda: draw_scores(scores)))
    if reductions:
        drawn.append(("reduction", lambda: draw_memory(reductions, "Sum of |W * G| by structure")))
    if elementwise:
        drawn.append(("elementwise", lambda: draw_memory(elementwise, "Elementwise parts of a decoder layer")))
    return _write(drawn, beside)


def write_prune_plots(result: dict[str, Any], beside: Path) -> list[Path]:
    """Pictures of a result of whole runs."""
    runs = [run for run in result["runs"] if "error" not in run]
    return _write([("run", lambda: draw_runs(runs))] if runs else [], beside)


def _write(drawn: Sequence[tuple[str, Callable[[], Figure]]], beside: Path) -> list[Path]:
    paths = []
    with themed(_THEME):
        for name, draw in drawn:
            path = beside.with_name(f"{beside.stem}-{name}.png")
            write_atomic(path, to_png(draw()))
            paths.append(path)
    return paths


def draw_scores(rows: Sequence[Row]) -> Figure:
    """Speed-up over cuBLAS and an eager reduction, a panel per token count, a line per shape."""
    tokens = sorted({row["tokens"] for row in rows})
    shapes = list(dict.fromkeys(_shape(row) for row in sorted(rows, key=_order)))
    figure = new_figure(1.6 + _INCH_PER_LINE * len(shapes))
    axes = figure.subplots(1, len(tokens), sharey=True, squeeze=False)[0]
    for ax, count in zip(axes, tokens, strict=True):
        here = [row for row in rows if row["tokens"] == count and "speedup" in row]
        _dots(ax, here, shapes, _SCORES, "speedup")
        ax.axvline(1, color=_THEME.muted, linewidth=1)
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
    ax.axvline(100, color=_THEME.muted, linewidth=1)
    ax.set_xlim(0, 1.12 * highest)
    ours = {_shape(row): row for row in rows if row["implementation"] == AUTO}
    for y, shape in enumerate(shapes):
        if shape in ours and "speedup" in ours[shape]:
            _note(ax, 1.12 * highest, y, f"{ours[shape]['speedup']:.1f}x")
    ax.set_title(title)
    ax.set_xlabel("% of copy bandwidth (fewest possible bytes over time); at the right: GISP over eager")
    _legend(figure, ax)
    return figure


def draw_runs(runs: Sequence[Row]) -> Figure:
    """Seconds of each phase, and speed and share of the ceiling of the importance pass over sparsity."""
    shared = any(row["percent_of_matmul"] is not None for run in runs for row in run["step_rows"])
    figure = new_figure(3.9 + 0.45 * len(runs))
    top, bottom = figure.subfigures(2, 1, height_ratios=(0.9 + 0.45 * len(runs), 3.0))
    _draw_phases(top.subplots(), runs)
    panels = bottom.subplots(1, 2 if shared else 1, squeeze=False)[0]
    _draw_over_sparsity(panels[0], runs, "tokens_per_second", "tokens per second", "Importance pass")
    paper = [(run, i) for i, run in enumerate(runs) if run.get("paper")]
    for run, i in paper:
        speed = run["paper"]["tokens_per_second"]
        panels[0].axhline(speed, color=_series(i), linestyle=(0, (4, 2)), linewidth=1.2)
        panels[0].set_ylim(top=max(panels[0].get_ylim()[1], 1.3 * speed))
    if paper:
        panels[0].plot([], [], color=_THEME.muted, linestyle=(0, (4, 2)), linewidth=1.2, label="paper's way, dense")
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panels[0].legend(loc="upper left")
    if shared:
        _draw_over_sparsity(panels[1], runs, "percent_of_matmul", "% of the 8192³ product", "Share of the ceiling")
        panels[1].set_ylim(0, 105)
    return figure


def _draw_phases(ax: Axes, runs: Sequence[Row]) -> None:
    names = [f"{_short(run)}, {run['steps']} steps to {100 * run['sparsity']:.0f} %" for run in runs]
    left = [0.0] * len(runs)
    phases = ["setup", *PHASES]
    for number, phase in enumerate(phases):
        values = [run["setup_seconds"] if phase == "setup" else run["phases"].get(phase, 0.0) for run in runs]
        colour = _THEME.muted if phase == "setup" else _series(number - 1)
        ax.barh(names, values, left=left, color=colour, height=0.55, label=phase.replace("_", " + "))
        left = [a + b for a, b in zip(left, values, strict=True)]
    for y, run in enumerate(runs):
        ax.text(max(left[y], run["seconds"]), y, f"  {run['seconds']:.1f} s in all", va="center", fontsize=9)
    ax.set_xlim(0, 1.25 * max(*left, *(run["seconds"] for run in runs)))
    ax.invert_yaxis()
    ax.set_xlabel("seconds")
    ax.set_title("Whole run")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(phases), columnspacing=1.0, handlelength=1.0)


def _draw_over_sparsity(ax: Axes, runs: Sequence[Row], key: str, label: str, title: str) -> None:
    for i, run in enumerate(runs):
        # The first step also compiles kernels.
        rows = [row for row in run["step_rows"][1:] if row[key] is not None]
        xs, ys = [100 * row["sparsity_before"] for row in rows], [row[key] for row in rows]
        single = MARKERS[i] if len(rows) < 40 else None
        ax.plot(xs, ys, color=_series(i), marker=single, markersize=4, label=_short(run))
    ax.set_xlabel("decoder sparsity (%)")
    ax.set_ylabel(label)
    ax.set_title(title)
    ax.set_ylim(bottom=0)
    low, high = ax.get_ylim()
    ax.set_ylim(low, 1.3 * high)
    ax.grid(axis="y")


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
        line = {"linestyle": "none", "marker": marker, "markersize": size, "zorder": order}
        ax.plot(xs, ys, color=_series(colour), label=label, markeredgecolor=_THEME.surface, markeredgewidth=0.6, **line)
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
    box = {"facecolor": _THEME.surface, "edgecolor": "none", "pad": 1.0}
    ax.text(x, y, text, ha="right", va="center", fontsize=8, color=_THEME.ink, bbox=box)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), columnspacing=1.2, handletextpad=0.3)


def _order(row: Row) -> tuple[Any, ...]:
    return (-float(row.get("kept", 1)), str(row["model"]))


def _shape(row: Row) -> str:
    what = row.get("projection") or row["op"].rstrip("_")
    return f"{_short(row)} {what} {row['rows']}x{row['width']}"


def _short(row: Row) -> str:
    return _SHORT.get(row["model"], row["model"])


def _series(number: int) -> str:
    theme: Theme = _THEME
    return theme.series[number % len(theme.series)]
