"""One look for every picture: colours for light and dark pages, fonts, and the way to PNG bytes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

_WIDTHS = {1: 4.4, 2: 9.0}
"""Inches of every picture by its columns, so that text has one size down the page."""
_DPI = 144


@dataclass(frozen=True)
class Theme:
    """Colours of one page background; series follow Okabe and Ito's colour-blind safe palette.

    Attributes:
        surface: background of picture and page.
        ink, muted, grid: text, axes and quiet text, grid lines.
        none_kept: a heat map cell of a layer that lost everything.
        series: lines and phases, in order of use; heads and channels have the first two in every picture.
        columns: axes side by side, 1 for narrow pages.
    """

    surface: str
    ink: str
    muted: str
    grid: str
    none_kept: str
    series: tuple[str, ...]
    columns: int = 2

    @property
    def narrow(self) -> Theme:
        """The same colours for a narrow page."""
        return replace(self, columns=1)


_BRIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_SOFT = ("#56b4e9", "#e69f00", "#2bc495", "#e39bc4", "#f0e442", "#4a8fd6")
LIGHT = Theme("#ffffff", ink="#1b1f24", muted="#57606a", grid="#e3e6ea", none_kept="#d55e00", series=_BRIGHT)
DARK = Theme("#161b22", ink="#e6edf3", muted="#9aa4af", grid="#30363d", none_kept="#ff7b39", series=_SOFT)
MARKERS = ("o", "s", "^", "D", "v", "P")
PERCENT = FuncFormatter(lambda fraction, _: f"{round(100 * fraction, 3):.3g} %")


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Matplotlib's defaults plus the theme while drawing; the user's settings come back afterwards."""
    colours: dict[str, Any] = {
        **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), theme.surface),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.muted),
        **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "text.color"), theme.ink),
        "grid.color": theme.grid,
    }
    shape: dict[str, Any] = {
        "font.size": 10,
        # Labels hold names of files, in which a dollar begins no formula.
        "text.parse_math": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "figure.constrained_layout.w_pad": 0.1,
        "figure.constrained_layout.h_pad": 0.08,
    }
    with style.context(["default", colours | shape]):
        yield


def new_figure(height: float, theme: Theme = LIGHT) -> Figure:
    """An empty figure that no global state knows of; ``height`` in inches."""
    figure = Figure(figsize=(_WIDTHS[theme.columns], height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_panels(count: int, height: float, theme: Theme, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with axes in rows of the theme's columns; a single one takes the whole width.

    Args:
        height: of a row, in inches.
        options: of matplotlib's ``subplots``.
    """
    columns = min(theme.columns, count)
    rows = math.ceil(count / columns)
    figure = new_figure(height * rows, theme)
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]


def draw_lines(ax: Axes, lines: Mapping[str, Sequence[tuple[float, float, float]]], theme: Theme) -> None:
    """Labelled lines of (x, y, standard error), a bar where the error is not 0."""
    for number, (label, points) in enumerate(lines.items()):
        xs, ys, errors = zip(*sorted(points), strict=True)
        colour, marker = theme.series[number % len(theme.series)], MARKERS[number % len(MARKERS)]
        bars = errors if any(errors) else None
        ax.errorbar(xs, ys, yerr=bars, color=colour, marker=marker, markersize=5, capsize=3, label=label)


def log_where_wide(ax: Axes, values: Sequence[float]) -> bool:
    """Give perplexities a logarithmic axis where the largest is more than 4 times the smallest; whether it did."""
    spread = max(values) / min(values) if min(values) > 0 else 1.0
    if spread > 4:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if spread > 1000 else (1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    return spread > 4


def sparsity_axis(ax: Axes) -> None:
    """Decoder sparsity from left to right, in percent."""
    ax.set_xlabel("decoder sparsity")
    ax.xaxis.set_major_formatter(PERCENT)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.margins(y=0.08)
    ax.grid(axis="y")


def to_png(figure: Figure) -> bytes:
    """PNG bytes, the same for the same figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Of a name in a script that the font lacks boxes are drawn; the page has its letters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
