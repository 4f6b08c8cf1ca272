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

from gisp.report.data import METRICS, RunData
from gisp.report.points import draw_evaluations, has_points
from gisp.report.style import PERCENT, Theme, new_figure, new_panels, sparsity_axis, themed, to_png

# Phases in order of time, each with its place in the theme's series.
_PHASES = {"forward_backward": 0, "select": 2, "compact": 3, "write": 1}
_OTHER_PHASE = 5
_TOP_MARGIN = 1.25
_NONE_HEIGHT = 0.05
# An axis cut above this multiple of the 98th percentile would otherwise show one slow step and a flat line.
_OUTLIER = 4
_DASHED = (0, (4, 2))
_NLL = "It is the mean negative log-likelihood of a token: lower is better."
# What the loss of an objective is, and how it is read.
_LOSSES = {
    "lm": ("nats per token", _NLL),
    "completion": ("nats per token", _NLL),
    "margin": (
        "margin, nats per token",
        "It is the mean negative log-likelihood of right answers minus that of wrong ones. Below 0 the model holds "
        "right answers for more likely, and a rise towards 0 means that it loses this preference.",
    ),
    "choice": (
        "nats per question",
        "It is minus the log of the share that the right answer has in the likelihood of all answers of a question: "
        "0 is certain, ln(K) is a guess among K answers.",
    ),
    "mixture": ("weighted tasks", "It is the weighted sum of the losses of the mixture's tasks."),
}


@dataclass(frozen=True)
class Picture:
    """One picture of the report.

    Attributes:
        name: of the PNG file, without suffix.
        title, note: heading and one sentence on how to read it.
        draw: the drawing function.
        reading: what more there is to say of a run's picture.
        has: whether a run has what it shows.
        absent: what stands in its place otherwise.
    """

    name: str
    title: str
    note: str
    draw: Callable[[RunData, Theme], Figure]
    reading: Callable[[RunData], str] = lambda run: ""
    has: Callable[[RunData], bool] = lambda run: True
    absent: str = ""


def render(run: RunData, theme: Theme) -> dict[str, bytes]:
    """PNG bytes of every picture this run has data for, by name."""
    with themed(theme):
        return {p.name: to_png(p.draw(run, theme)) for p in PICTURES if p.has(run)}


def draw_quality(run: RunData, theme: Theme) -> Figure:
    """Every evaluated point against decoder sparsity."""
    return draw_evaluations(run.evaluations, theme)


def draw_loss(run: RunData, theme: Theme) -> Figure:
    """Calibration loss of the model each step started from."""
    figure = new_figure(3.4, theme)
    ax = figure.subplots()
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
    ax.set(title="Calibration loss", ylabel=f"loss ({loss_unit(run)})")
    sparsity_axis(ax)
    return figure


def loss_unit(run: RunData) -> str:
    """What the run's loss is, in two or three words."""
    return _LOSSES.get(_objective(run), (_objective(run), ""))[0]


def loss_reading(run: RunData) -> str:
    """How the run's loss is read, one or two sentences; empty for a loss of the user's own."""
    return _LOSSES.get(_objective(run), ("", ""))[1]


def _objective(run: RunData) -> str:
    return "mixture" if run.data.get("tasks") else str(run.config.get("objective", "lm"))


def draw_kept_over_steps(run: RunData, theme: Theme) -> Figure:
    """Two heat maps, layer by step: fraction of heads and of channels kept."""
    layers, steps = len(run.heads), len(run.steps)
    figure, axes = new_panels(2, min(3.2 + 0.06 * layers, 7.5), theme, sharey=True)
    none_kept = any(bool((run.kept_fraction(kind)[:, -1] <= 0).any()) for kind in ("heads", "channels"))
    for ax, kind in zip(axes, ("heads", "channels"), strict=True):
        kept = run.kept_fraction(kind)
        # Exactly zero falls below the scale and takes its own colour.
        colours = matplotlib.colormaps["cividis"].with_extremes(under=theme.none_kept)
        place: dict[str, Any] = {"aspect": "auto", "origin": "lower", "extent": (-0.5, steps + 0.5, -0.5, layers - 0.5)}
        image = ax.imshow(kept, cmap=colours, vmin=1e-9, vmax=1, interpolation="nearest", **place)
        ax.set(title=f"{kind.capitalize()} kept", xlabel="step (0 = dense)")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(10, integer=True))
        _sparsity_on_top(ax, run, theme)
    axes[0].set_ylabel("layer (0 = input end)")
    ends: dict[str, Any] = {"extend": "min" if none_kept else "neither", "extendrect": True, "extendfrac": _NONE_HEIGHT}
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30, label="fraction kept", **ends)
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
    narrow = theme.columns == 1
    figure = new_figure(1.1 + (2.4 if narrow else 1.75) * len(shown), theme)
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
            # Beside the axes where there is room, else over them.
            place: dict[str, Any] = (
                {"loc": "upper left"} if narrow else {"loc": "upper left", "bbox_to_anchor": (1.0, 1.05)}
            )
            ax.legend(**place)
        ax.set_ylim(0, (1.8 if narrow else 1.0) * ax.get_ylim()[1])
        ax.grid(axis="y")
    axes[-1].set_xlabel("log10 of the normalised score, of those above 0")
    figure.supylabel("density: share of these heads or channels per decade", fontsize=10)
    return figure


def draw_seconds(run: RunData, theme: Theme) -> Figure:
    """Seconds of each phase, stacked over the steps, and their totals."""
    seconds = phase_seconds(run)
    colours = {phase: theme.series[_PHASES.get(phase, _OTHER_PHASE)] for phase in seconds}
    ratios = {"width_ratios": (3, 2)} if theme.columns == 2 else {"height_ratios": (3, 2)}
    figure, (left, right) = new_panels(2, 3.9 if theme.columns == 2 else 3.0, theme, **ratios)
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


def _aside(ax: Axes, text: str, theme: Theme) -> None:
    """A quiet remark at the right end of a title line."""
    ax.set_title(text, loc="right", fontsize=9, color=theme.muted, weight="normal")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _measured_on(run: RunData) -> str:
    """The conditions that all lines share; where there are several, the lines name theirs."""
    found = {", ".join(filter(None, (e.source, e.conditions))) for e in run.evaluations}
    return f"Measured on {found.pop()}." if len(found) == 1 else ""


def _has_metrics(run: RunData) -> bool:
    return bool(run.metrics)


_NO_METRICS = f"Not shown: this run has no {METRICS}."
PICTURES = (
    Picture(
        "quality",
        "Quality against sparsity",
        "Every point that was evaluated, the dense model at 0 %, with what it is compared with. "
        "Bars are standard errors.",
        draw_quality,
        _measured_on,
        has=lambda run: has_points(run.evaluations),
        absent="Not evaluated yet. This command adds the figures of the dense model and of two sizes, here and in gisp "
        "inspect: gisp eval RUN --sparsities 0.2,0.3 --data HELDOUT",
    ),
    Picture(
        "loss",
        "Calibration loss",
        "Loss on the calibration data of the model each step started from, before its removal.",
        draw_loss,
        loss_reading,
    ),
    Picture(
        "kept_over_steps",
        "What is kept, step by step",
        "Each column is the model after one step; a row that stays bright is a layer left alone or protected.",
        draw_kept_over_steps,
    ),
    Picture(
        "scores",
        "Scores of heads and channels",
        "Heads and channels are ranked together; the threshold is the highest score removed at that step.",
        draw_scores,
        has=_has_metrics,
        absent=_NO_METRICS,
    ),
    Picture(
        "seconds",
        "Where the time goes",
        "Wall seconds of each phase of a step, stacked, and summed over the run.",
        draw_seconds,
        has=_has_metrics,
        absent=_NO_METRICS,
    ),
)
