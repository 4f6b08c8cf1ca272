"""Pictures of whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.common.plots import THEME, series, short, write_figures
from gisp.report.style import MARKERS, new_figure
from gisp.run.metrics.measure import PHASES

Row = dict[str, Any]


def write_plots(result: dict[str, Any], beside: Path) -> list[Path]:
    """Pictures of a result of whole runs."""
    runs = [run for run in result["runs"] if "error" not in run]
    return write_figures({"run": lambda: draw_runs(runs)} if runs else {}, beside)


def draw_runs(runs: Sequence[Row]) -> Figure:
    """Seconds of each phase, and speed and share of the ceiling of the importance pass over sparsity."""
    shared = any(row["percent_of_matmul"] is not None for run in runs for row in run["step_rows"])
    figure = new_figure(3.9 + 0.45 * len(runs))
    parts: Any = figure.subfigures(2, 1, height_ratios=(0.9 + 0.45 * len(runs), 3.0))
    top, bottom = parts
    _draw_phases(top.subplots(), runs)
    panels = bottom.subplots(1, 2 if shared else 1, squeeze=False)[0]
    _draw_over_sparsity(panels[0], runs, "tokens_per_second", "tokens per second", "Importance pass")
    paper = [(run, i) for i, run in enumerate(runs) if run.get("paper")]
    for run, i in paper:
        speed = run["paper"]["tokens_per_second"]
        panels[0].axhline(speed, color=series(i), linestyle=(0, (4, 2)), linewidth=1.2)
        panels[0].set_ylim(top=max(panels[0].get_ylim()[1], 1.3 * speed))
    if paper:
        panels[0].plot([], [], color=THEME.muted, linestyle=(0, (4, 2)), linewidth=1.2, label="paper's way, dense")
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panels[0].legend(loc="upper left")
    if shared:
        _draw_over_sparsity(panels[1], runs, "percent_of_matmul", "% of the 8192³ product", "Share of the ceiling")
        panels[1].set_ylim(0, 105)
    return figure


def _draw_phases(ax: Axes, runs: Sequence[Row]) -> None:
    names = [f"{short(run)}, {run['steps']} steps to {100 * run['sparsity']:.0f} %" for run in runs]
    left = [0.0] * len(runs)
    phases = ["setup", *PHASES]
    for number, phase in enumerate(phases):
        values = [run["setup_seconds"] if phase == "setup" else run["phases"].get(phase, 0.0) for run in runs]
        colour = THEME.muted if phase == "setup" else series(number - 1)
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
        ax.plot(xs, ys, color=series(i), marker=single, markersize=4, label=short(run))
    ax.set_xlabel("decoder sparsity (%)")
    ax.set_ylabel(label)
    ax.set_title(title)
    ax.set_ylim(bottom=0)
    low, high = ax.get_ylim()
    ax.set_ylim(low, 1.3 * high)
    ax.grid(axis="y")
