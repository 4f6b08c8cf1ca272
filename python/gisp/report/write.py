"""``gisp report``: a run folder becomes one page and a few pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gisp.errors import GispError
from gisp.files import disk_message, write_atomic
from gisp.report.data import read_run
from gisp.report.html import build_page
from gisp.report.plots import render
from gisp.report.style import DARK, LIGHT

HTML = "report.html"
PLOTS = "plots"
_THEMES = {"light": LIGHT, "dark": DARK, "light narrow": LIGHT.narrow, "dark narrow": DARK.narrow}


@dataclass(frozen=True)
class ReportFiles:
    """What a report wrote.

    Attributes:
        html: the page; it needs no other file.
        pngs: the page's pictures on a light background.
    """

    html: Path
    pngs: tuple[Path, ...]


def write_report(run: Path) -> ReportFiles:
    """Write ``report.html`` and ``plots/*.png`` into a run folder, finished or not.

    Reads ``trajectory.json``, ``trajectory.safetensors`` and, where there, ``metrics.jsonl`` (scores, seconds) and
    ``evaluations.json`` (quality). The same run gives the same files. Every file appears whole or not at all,
    the page last.

    Raises:
        GispError: the folder holds no run or a corrupt one (nothing is written), or it cannot be written.
    """
    run = Path(run)
    data = read_run(run)
    looks = {name: render(data, theme) for name, theme in _THEMES.items()}
    page = build_page(data, looks)
    plots = run / PLOTS
    try:
        plots.mkdir(exist_ok=True)
    except OSError as error:
        raise GispError(disk_message(plots, error)) from None
    pngs = []
    for name, png in looks["light"].items():
        pngs.append(plots / f"{name}.png")
        write_atomic(pngs[-1], png)
    write_atomic(run / HTML, page.encode())
    return ReportFiles(run / HTML, tuple(pngs))
