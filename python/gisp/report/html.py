"""The report page: ``page.html`` with pictures and tables inside; its script moves the slider, nothing is fetched."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from gisp.config.memory import gigabytes
from gisp.config.options import criterion_text
from gisp.report.data import RunData, basename
from gisp.report.evaluations import HEADER, TEXTS, evaluation_rows
from gisp.report.plots import PICTURES, Picture
from gisp.report.sizes import sizes_section

_NARROW = "(max-width: 40rem)"
_DARK = "(prefers-color-scheme: dark)"
# The first that fits is shown, the last one on paper, too.
LOOKS = {
    "dark narrow": f"screen and {_DARK} and {_NARROW}",
    "dark": f"screen and {_DARK}",
    "light narrow": f"screen and {_NARROW}",
    "light": "",
}
"""Looks of a picture, and the media each is for."""
_STEP_ROWS = 25
_ABSENT = "not recorded"
_IN_MEMORY = "model in memory"

Row = tuple[str, str]


def _percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f} %"


_WHOLE = "{:,}".format


def _whole_or_absent(value: int | None) -> str:
    return _ABSENT if value is None else _WHOLE(value)


# Key of a step's record, heading and form of every column of the table of steps.
_STEP_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("step", "Step", _WHOLE),
    ("sparsity", "Decoder sparsity", _percent),
    ("model_sparsity", "Whole-model sparsity", _percent),
    ("removed_parameters", "Parameters removed", _WHOLE),
    ("heads_removed", "Heads removed", _WHOLE),
    ("channels_removed", "Channels removed", _WHOLE),
    ("loss", "Loss before", "{:.4f}".format),
    ("tokens", "Tokens", _WHOLE),
    ("seconds", "Seconds", "{:,.3f}".format),
    ("kv_bytes_per_token", "KV B/token", _whole_or_absent),
)


def build_page(run: RunData, looks: Mapping[str, Mapping[str, bytes]]) -> str:
    """The whole page.

    Args:
        looks: PNG bytes by picture name, the same names in each, by a name of :data:`LOOKS`; the reader's colour
            scheme and width pick.
    """
    sections = {picture.name: _picture_section(run, picture, looks) for picture in PICTURES}
    parts = [
        _tiles(run),
        sections.pop("quality"),
        _evaluations(run),
        sizes_section(run),
        *sections.values(),
        _section("Summary", "", _pairs(summary_rows(run))),
        _details("Steps", _steps_table(run)),
        _details("Options", _pairs([(name, _plain(value)) for name, value in run.config.items()])),
    ]
    page = Template(files("gisp.report").joinpath("page.html").read_text(encoding="utf-8"))
    title = basename(str(run.base_model.get("path") or "")) or _IN_MEMORY
    return page.substitute(title=escape(title), status=escape(_status(run)), body="\n".join(filter(None, parts)))


def summary_rows(run: RunData) -> list[Row]:
    """Name and value of every line of the summary table."""
    base, last = run.base_model, run.last
    heads, channels = run.kept_count("heads"), run.kept_count("channels")
    end, removed = len(run.steps), last["removed_parameters"]
    rows = [
        ("Base model", str(base.get("path") or _IN_MEMORY)),
        ("Architecture", _architecture(run)),
        ("Preset", str(run.config.get("preset", _ABSENT))),
        ("Criterion", criterion_text(run.config)),
        ("Status", _status(run)),
        ("Steps", f"{len(run.steps):,}"),
        ("Decoder sparsity", _percent(last["sparsity"])),
        ("Whole-model sparsity", _percent(last["model_sparsity"])),
        ("Parameters an export stores", _change(base["parameters"], run.stored([end])[0].parameters)),
        ("Decoder parameters left", _change(base["decoder_parameters"], base["decoder_parameters"] - removed)),
        ("Attention heads", _change(heads[1], heads[0])),
        ("MLP channels", _change(channels[1], channels[0])),
        ("KV cache per token of an export", _change(run.dense_kv_bytes(), run.stored_kv_bytes(end), " B")),
        ("Calibration tokens, all steps", f"{int(run.total('tokens')):,}"),
        ("Total time of the steps", _duration(run.total("seconds"))),
    ]
    if run.data.get("spec"):
        rows.insert(3, ("Calibration data", _data(run)))
    peaks = [entry["peak_bytes"] for entry in run.metrics.values() if entry.get("peak_bytes")]
    if peaks:
        rows.append(("Peak GPU memory", f"{gigabytes(max(peaks))}"))
    rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())))
    return rows


def step_rows(run: RunData) -> list[int]:
    """Indices of at most 25 evenly spaced steps, first and last among them."""
    last = len(run.steps) - 1
    return np.unique(np.linspace(0, last, min(_STEP_ROWS, last + 1)).round().astype(int)).tolist()


def _tiles(run: RunData) -> str:
    base, last = run.base_model, run.last
    after = run.stored([len(run.steps)])[0].parameters
    tiles = [
        ((_percent(last["sparsity"], 1),), "of the decoder's parameters removed"),
        (_arrow(_short(base["parameters"], "kMB"), _short(after, "kMB")), "parameters an export stores"),
    ]
    kv = run.dense_kv_bytes()
    kv_after = run.stored_kv_bytes(len(run.steps))
    if kv and kv_after is not None:
        tiles.append((_arrow(f"{_short(kv, 'kMG')}B", f"{_short(kv_after, 'kMG')}B"), "KV cache per token"))
    seconds = run.total("seconds")
    tiles.append(((_clock(seconds),), f"for {len(run.steps):,} step{'s' * (len(run.steps) > 1)}"))
    # A line may break between numbers, never within one.
    cells = "".join(
        f'<div class="tile"><b>{" ".join(f"<span>{escape(part)}</span>" for part in big)}</b>'
        f"<small>{escape(small)}</small></div>"
        for big, small in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _arrow(before: str, after: str) -> tuple[str, str]:
    return before.strip(), f"→ {after.strip()}"


def _picture_section(run: RunData, picture: Picture, looks: Mapping[str, Mapping[str, bytes]]) -> str:
    if picture.name not in looks["light"]:
        return _section(picture.title, picture.absent, "")
    note = " ".join(filter(None, (picture.note, picture.reading(run))))
    sources = "".join(
        f'<source media="{media}" srcset="{_data_uri(looks[look][picture.name])}">'
        for look, media in LOOKS.items()
        if media
    )
    alt = escape(f"{picture.title}. {note}")
    image = f'<img src="{_data_uri(looks["light"][picture.name])}" alt="{alt}">'
    return _section(picture.title, note, f"<figure><picture>{sources}{image}</picture></figure>")


def _evaluations(run: RunData) -> str:
    if not run.evaluations:
        return ""
    rows = evaluation_rows(run.evaluations)
    return _details(f"All {len(rows):,} figures" if len(rows) > 1 else "The figure", _table(HEADER, rows, text=TEXTS))


def _steps_table(run: RunData) -> str:
    shown_steps = [
        {**run.steps[index], "kv_bytes_per_token": run.stored_kv_bytes(index + 1)} for index in step_rows(run)
    ]
    rows = [[form(step[key]) for key, _, form in _STEP_COLUMNS] for step in shown_steps]
    shown = f"{len(rows)} of {len(run.steps):,} steps, evenly spaced. " if len(rows) < len(run.steps) else ""
    header = [title for _, title, _ in _STEP_COLUMNS]
    return f'<p class="note">{shown}Removed counts are totals after the step.</p>' + _table(header, rows)


def _section(title: str, note: str, body: str) -> str:
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{below}{body}</section>"


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary><div>{body}</div></details>"


def _pairs(rows: Iterable[Row]) -> str:
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f'<div class="scroll"><table class="pairs"><tbody>{cells}</tbody></table></div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    """A table whose columns are numbers, except those at the positions ``text``."""

    def cells(values: Sequence[str], tag: str) -> str:
        kinds = ["" if i in text else ' class="number"' for i in range(len(values))]
        return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    head = cells(header, "th")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _status(run: RunData) -> str:
    done, planned = len(run.steps), run.config.get("steps")
    rounds = run.config.get("regrow", 0)
    of = f" of {planned + rounds:,}" if isinstance(planned, int) and planned + rounds != done else ""
    word = "complete" if run.complete else "unfinished"
    return f"{word} after step {done:,}{of}"


def _architecture(run: RunData) -> str:
    base = run.base_model
    return (
        f"{base.get('model_type', 'unknown type')}, {base['layers']} layers, "
        f"{base['num_attention_heads']} heads ({base['num_key_value_heads']} key/value) of {base['head_dim']}, "
        f"{base['intermediate_size']:,} channels per layer"
    )


def _data(run: RunData) -> str:
    count = run.data.get("sequences")
    return str(run.data["spec"]) + (f" ({count:,} sequences)" if isinstance(count, int) else "")


def _change(before: int | None, after: int | None, unit: str = "") -> str:
    """Before and after, and what is left in percent."""
    if before is None or after is None:
        return _ABSENT
    left = f" ({100 * after / before:.1f} %)" if before else ""
    return f"{before:,}{unit} → {after:,}{unit}{left}"


def _short(value: float, prefixes: str) -> str:
    """A number in three digits with one of three decimal prefixes, for 10^3, 10^6 and 10^9."""
    power = min(int(math.log10(value)) // 3, len(prefixes)) if value >= 1 else 0
    digits = f"{value / 1000**power:.3g}"
    return f"{digits} {prefixes[power - 1] if power else ''}"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _duration(seconds: float) -> str:
    exact = f"{seconds:,.1f} s"
    return exact if seconds < 60 else f"{exact} ({_clock(seconds)})"


def _plain(value: object) -> str:
    return "not set" if value is None else str(value)
