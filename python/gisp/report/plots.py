"""The pictures of a report. Every drawing function takes a run and a theme and returns a figure of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gisp.report.data import RunData, basename
from gisp.report.style import PERCENT, Theme, draw_lines, log_where_wide, new_figure, sparsity_axis, themed, to_png

# Phases in order of time, each with its place in the theme's series.
_PHASES = {"forward_backward": 0, "select": 2, "compact": 3, "write": 1}
_OTHER_PHASE = 5
_TOP_MARGIN = 1.25
_NONE_HEIGHT = 0.05
# An axis cut above this multiple of the 98th percentile would otherwise show one slow step and a flat line.
_OUTLIER = 4
_DASHED = (0, (4, 2))


@dataclass(frozen=True)
class Picture:
    """One picture of the report.

    Attributes:
        name: of the PNG file, without suffix.
        title, note: heading and one sentence on how to read it.
        draw: the drawing function.
        from_metrics: whether it shows ``metrics.jsonl``.
    """

    name: str
    title: str
    note: str
    draw: Callable[[RunData, Theme], Figure]
    from_metrics: bool = False


def render(run: RunData, theme: Theme) -> dict[str, bytes]:
    """PNG bytes of every picture this run has data for, by name."""
    with themed(theme):
        return {p.name: to_png(p.draw(run, theme)) for p in PICTURES if run.metrics or not p.from_metrics}


def draw_quality(run: RunData, theme: Theme) -> Figure:
    """Perplexity (when evaluated) and calibration loss against decoder sparsity."""
    figure = new_figure(3.9)
    if any(np.isfinite(e.perplexity) for e in run.evaluations):
        left, right = figure.subplots(1, 2)
        _draw_perplexity(left, run, theme)
    else:
        right = figure.subplots()
    _draw_loss(right, run, theme)
    return figure


def _draw_perplexity(ax: Axes, run: RunData, theme: Theme) -> None:
    conditions = list(dict.fromkeys((e.data, e.window) for e in run.evaluations))
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for e in run.evaluations:
        if np.isfinite(e.perplexity):
            # Perplexities on other text or windows are no points of the same line.
            label = e.label if len(conditions) == 1 else f"{e.label}: {basename(e.data)}, window {e.window}"
            lines.setdefault(label, []).append((e.sparsity, e.perplexity, 0.0))
    draw_lines(ax, lines, theme)
    log = log_where_wide(ax, [y for points in lines.values() for _, y, _ in points])
    ax.set(title="Perplexity", ylabel="perplexity (log scale)" if log else "perplexity")
    if len(conditions) == 1:
        data, window = conditions[0]
        _aside(ax, f"{basename(data)}, window {window} tokens", theme)
    ax.legend(loc="upper left")
    sparsity_axis(ax)


def _draw_loss(ax: Axes, run: RunData, theme: Theme) -> None:
    xs, ys = run.sparsity_before(), run.column("loss")
    window = max(1, len(ys) // 20)
    # A step of the stream engine sees one fresh batch: its loss is noisy, its running mean is not.
    if run.config.get("engine") == "stream" and window > 1:
        ax.plot(xs, ys, color=theme.series[0], alpha=0.35, linewidth=1, label="batch of each step")
        mean = np.convolve(ys, np.ones(window) / window, mode="valid")
        middle = np.convolve(xs, np.ones(window) / window, mode="valid")
        ax.plot(middle, mean, color=theme.series[0], label=f"mean of {window} steps")
        ax.legend(loc="upper left")
    else:
        ax.plot(xs, ys, color=theme.series[0], marker="o" if len(ys) < 40 else None, markersize=4)
    objective = "mixture" if run.data.get("tasks") else run.config.get("objective", "lm")
    unit = "nats per token" if objective in ("lm", "completion") else objective
    ax.set(title="Calibration loss", ylabel=f"loss ({unit})")
    sparsity_axis(ax)


def draw_kept_over_steps(run: RunData, theme: Theme) -> Figure:
    """Two heat maps, layer by step: fraction of heads and of channels kept."""
    layers, steps = len(run.heads), len(run.steps)
    figure = new_figure(min(3.2 + 0.06 * layers, 7.5))
    axes = figure.subplots(1, 2, sharey=True)
    none_kept = any(bool((run.kept_fraction(kind)[:, -1] <= 0).any()) for kind in ("heads", "channels"))
    for ax, kind in zip(axes, ("heads", "channels"), strict=True):
        kept = run.kept_fraction(kind)
        # Exactly zero falls below the scale and takes its own colour.
        colours = matplotlib.colormaps["cividis"].with_extremes(under=theme.none_kept)
        place = {"aspect": "auto", "origin": "lower", "extent": (-0.5, steps + 0.5, -0.5, layers - 0.5)}
        image = ax.imshow(kept, cmap=colours, vmin=1e-9, vmax=1, interpolation="nearest", **place)
        ax.set(title=f"{kind.capitalize()} kept", xlabel="step (0 = dense)")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(10, integer=True))
        _sparsity_on_top(ax, run, theme)
    axes[0].set_ylabel("layer (0 = input end)")
    ends: dict[str, Any] = {"extend": "min" if none_kept else "neither", "extendrect": True, "extendfrac": _NONE_HEIGHT}
    bar = figure.colorbar(image, ax=list(axes), pad=0.02, aspect=30, label="fraction kept", **ends)
    bar.ax.yaxis.set_major_formatter(PERCENT)
    bar.set_ticks([0.25, 0.5, 0.75, 1] if none_kept else [1e-9, 0.25, 0.5, 0.75, 1])
    if none_kept:
        bar.ax.text(1.55, -_NONE_HEIGHT / 2, "none", transform=bar.ax.transAxes, va="center", color=theme.muted)
    return figure


def _sparsity_on_top(ax: Axes, run: RunData, theme: Theme) -> None:
    steps = len(run.steps)
    at = np.unique(np.linspace(0, steps, min(steps + 1, 5)).round().astype(int))
    sparsity = np.concatenate([[0.0], run.column("sparsity")])
    top = ax.secondary_xaxis("top")
    top.set_xticks(at, labels=[f"{100 * sparsity[i]:.3g} %" for i in at])
    top.tick_params(labelsize=8.5, length=3)
    top.spines["top"].set_visible(False)
    top.set_xlabel("decoder sparsity", fontsize=8.5, color=theme.muted)


def draw_scores(run: RunData, theme: Theme) -> Figure:
    """Distribution of the positive scores of heads and channels at the first, middle and last step."""
    known = list(run.metrics)
    shown = list(dict.fromkeys((known[0], known[len(known) // 2], known[-1])))
    figure = new_figure(1.1 + 1.75 * len(shown))
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for ax, step in zip(axes, shown, strict=True):
        entry = run.metrics[step]
        edges = np.array(entry["score_histogram"]["log10_edges"])
        for kind, colour in zip(("heads", "channels"), theme.series, strict=False):
            counts, widths = np.array(entry["score_histogram"][kind], dtype=np.float64), np.diff(edges)
            off = int(entry["score_histogram"]["not_positive"][kind])
            label = f"{kind} ({int(counts.sum()) + off:,} scored" + (f", {off:,} at or below 0)" if off else ")")
            if not counts.sum() and off:
                ax.plot([], [], color=colour, linewidth=1.5, label=label)
            if counts.sum() and widths.min() > 0:
                density = counts / counts.sum() / widths
                ax.stairs(density, edges, fill=True, color=colour, alpha=0.25, linewidth=0)
                ax.stairs(density, edges, color=colour, linewidth=1.5, label=label)
        if entry["threshold"] is not None and entry["threshold"] > 0:
            label = f"threshold {entry['threshold']:.2e}"
            ax.axvline(float(np.log10(entry["threshold"])), color=theme.ink, ls=_DASHED, lw=1.3, label=label)
        ax.set(title=f"Step {step}")
        _aside(ax, f"scored at {100 * run.sparsity_before()[step - 1]:.1f} % sparsity", theme)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05))
        ax.set_ylim(bottom=0)
        ax.grid(axis="y")
    axes[-1].set_xlabel("log10 of the normalised score, of those above 0")
    figure.supylabel("density: share of these heads or channels per decade", fontsize=10)
    return figure


def draw_seconds(run: RunData, theme: Theme) -> Figure:
    """Seconds of each phase, stacked over the steps, and their totals."""
    seconds = phase_seconds(run)
    colours = {phase: theme.series[_PHASES.get(phase, _OTHER_PHASE)] for phase in seconds}
    figure = new_figure(3.9)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    edges = np.arange(len(run.steps) + 1) + 0.5
    base = np.zeros(len(run.steps))
    for phase, values in seconds.items():
        top = base + values
        left.stairs(top, edges, baseline=base, fill=True, color=colours[phase], linewidth=0)
        base = top
    _cut_outliers(left, base, theme)
    left.set(title="Seconds per step", xlabel="step", ylabel="seconds", xlim=(edges[0], edges[-1]))
    left.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    left.grid(axis="y")

    totals = {phase: float(values.sum()) for phase, values in seconds.items()}
    whole = sum(totals.values()) or 1.0
    names = ["forward + backward" if phase == "forward_backward" else phase.replace("_", " ") for phase in totals]
    bars = right.barh(names, list(totals.values()), color=list(colours.values()), height=0.62)
    labels = [f"{_number(t)} s  ({100 * t / whole:.0f} %)" for t in totals.values()]
    right.bar_label(bars, labels, padding=4, fontsize=9)
    right.invert_yaxis()
    right.set(title="Totals", xlabel="seconds", xlim=(0, 1.45 * (max(totals.values()) or 1.0)))
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.tick_params(axis="y", length=0, labelcolor=theme.ink)
    right.spines["left"].set_visible(False)
    return figure


def phase_seconds(run: RunData) -> dict[str, np.ndarray]:
    """Seconds of every recorded phase, float64 [steps]; 0 where a step has no metrics."""
    found = {phase for entry in run.metrics.values() for phase in entry["seconds"]}
    order = [phase for phase in _PHASES if phase in found] + sorted(found - _PHASES.keys())
    seconds = {phase: np.zeros(len(run.steps)) for phase in order}
    for step, entry in run.metrics.items():
        for phase, value in entry["seconds"].items():
            seconds[phase][step - 1] = value
    return seconds


def _cut_outliers(ax: Axes, totals: np.ndarray, theme: Theme) -> None:
    usual = float(np.percentile(totals, 98))
    highest = int(totals.argmax())
    if usual > 0 and totals[highest] > _OUTLIER * usual:
        ax.set_ylim(0, _TOP_MARGIN * usual)
        _aside(ax, f"axis cut: step {highest + 1} took {_number(totals[highest])} s", theme)
    elif totals[highest] > 0:
        ax.set_ylim(0, 1.05 * totals[highest])


def draw_kept_per_layer(run: RunData, theme: Theme) -> Figure:
    """Bars: fraction of heads and of channels each layer keeps at the end."""
    figure = new_figure(4.8)
    axes = figure.subplots(2, 1, sharex=True)
    layers = np.arange(len(run.heads))
    for ax, kind, colour in zip(axes, ("heads", "channels"), theme.series, strict=False):
        kept = run.kept_fraction(kind)[:, -1]
        left, whole = run.kept_count(kind)
        ax.bar(layers, kept, color=colour, width=0.78)
        ax.axhline(left / whole, color=theme.ink, ls=_DASHED, lw=1)
        for layer in layers[kept <= 0]:
            ax.text(layer, 0.02, "0", ha="center", va="bottom", color=theme.ink, fontsize=9, weight="bold")
        ax.set(title=kind.capitalize(), ylabel="fraction kept", ylim=(0, 1.04), yticks=[0, 0.25, 0.5, 0.75, 1])
        _aside(ax, f"{left:,} of {whole:,} kept, {100 * left / whole:.1f} % (dashed)", theme)
        ax.yaxis.set_major_formatter(PERCENT)
        ax.grid(axis="y")
    axes[-1].set(xlabel="layer (0 = input end)", xlim=(-0.6, len(layers) - 0.4))
    axes[-1].xaxis.set_major_locator(MaxNLocator(20, integer=True))
    return figure


def _aside(ax: Axes, text: str, theme: Theme) -> None:
    """A quiet remark at the right end of a title line."""
    ax.set_title(text, loc="right", fontsize=9, color=theme.muted, weight="normal")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


PICTURES = (
    Picture(
        "quality",
        "Quality against sparsity",
        "Perplexity where the run was evaluated, and the calibration loss of the model each step started from.",
        draw_quality,
    ),
    Picture(
        "kept_over_steps",
        "What is kept, step by step",
        "Each column is the model after one step; a row that stays bright is a layer left alone or protected.",
        draw_kept_over_steps,
    ),
    Picture(
        "kept_per_layer",
        "What is kept at the end",
        "Fraction of its original heads and channels every layer keeps after the last step.",
        draw_kept_per_layer,
    ),
    Picture(
        "scores",
        "Scores of heads and channels",
        "Heads and channels are ranked together; the threshold is the highest score removed at that step.",
        draw_scores,
        from_metrics=True,
    ),
    Picture(
        "seconds",
        "Where the time goes",
        "Wall seconds of each phase of a step, stacked, and summed over the run.",
        draw_seconds,
        from_metrics=True,
    ),
)
