"""What pictures of benchmark results share; they lie beside the JSON they are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gisp.files import write_atomic
from gisp.report.style import LIGHT, themed, to_png

THEME = LIGHT
_SHORT = {"llama-2-13b": "13B", "llama-3-8b": "8B"}


def write_figures(drawn: Mapping[str, Callable[[], Figure]], beside: Path) -> list[Path]:
    """Draw pictures by name, in the theme, and write them beside a result."""
    paths = []
    with themed(THEME):
        for name, draw in drawn.items():
            paths.append(beside.with_name(f"{beside.stem}-{name}.png"))
            write_atomic(paths[-1], to_png(draw()))
    return paths


def short(row: Mapping[str, Any]) -> str:
    """Name of a row's model in a picture."""
    return _SHORT.get(row["model"], row["model"])


def series(number: int) -> str:
    """Colour of a line by its place."""
    return THEME.series[number % len(THEME.series)]
