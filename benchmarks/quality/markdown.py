"""Markdown tables and a picture of results of the study.

    python -m benchmarks.quality.markdown R.json [MORE.json] [--png FILE]

Tables: perplexity by size, every task's accuracy and the lead over guessing by size, seconds beside perplexity.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common.command import Parser, exit_code, read_json
from benchmarks.quality.cells import STUDIES
from benchmarks.quality.summary import LEAD, cell_text, collect, spend, tasks_of, with_leads
from gisp.errors import GispError

Result = dict[str, Any]
Values = dict[float, list[float]]


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    rows = [list(header), *map(list, lines)]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def by_size(result: Result, study: str, metric: str, *, percent: bool = False) -> str:
    """A measure at every size, best at the largest first, with what each run cost; empty without figures."""
    found = {key: values for key, values in collect(result["cells"], metric).items() if key[0] == study}
    sizes = sorted({size for values in found.values() for size in values})
    if not sizes:
        return ""
    scale = 100 if percent else 1
    sign = -1 if percent else 1
    costs = spend(result["cells"])
    ordered = sorted(found.items(), key=lambda item: sign * _at(item[1], sizes[-1], sign))
    lines = []
    for (_, name, extra), values in ordered:
        tokens, seconds = costs[(study, name)]
        shown = [cell_text([scale * v for v in values[s]]) if s in values else "-" for s in sizes]
        seeds = str(max(map(len, values.values())))
        lines.append([_way(name, extra), *shown, f"{tokens / 1e6:.2f}M", f"{seconds:.0f}", seeds])
    best = result["dense"].get(metric)
    title = f"{metric}, %" if percent else metric
    if best is not None:
        title += f" (dense {scale * best:.2f})"
    return markdown([title, *(f"{100 * s:g} %" for s in sizes), "tokens", "seconds", "seeds"], lines)


def accuracy(result: Result, study: str, size: float) -> str:
    """Accuracy on every task at a size, and the part of the lead over guessing that is left; empty without tasks."""
    tasks, dense = tasks_of(result["dense"]), result["dense"]
    metrics = [*(f"acc {task}" for task in tasks), LEAD]
    found = {metric: collect(result["cells"], metric) for metric in metrics}
    ways = [key for key in found[LEAD] if key[0] == study and size in found[LEAD][key]]
    if not ways:
        return ""
    ways.sort(key=lambda key: -statistics.mean(found[LEAD][key][size]))
    lines = [["dense", *(f"{100 * dense[f'acc {task}']:.1f}" for task in tasks), "100"]]
    lines.append(["guessing", *(f"{100 * dense[f'chance {task}']:.1f}" for task in tasks), "0"])
    for key in ways:
        values = [found[metric].get(key, {}).get(size) for metric in metrics]
        lines.append([_way(*key[1:]), *(f"{100 * statistics.mean(v):.1f}" if v else "-" for v in values)])
    return markdown([f"acc at {100 * size:g} %", *tasks, LEAD], lines)


def time_curve(result: Result, study: str) -> str:
    """Seconds to each size, pruning and compensation, beside the perplexity there: mean over seeds; one row a way."""
    sizes = sorted({point["asked"] for cell in result["cells"] for point in cell.get("points", ())})
    plain, extra = collect(result["cells"], "seconds"), collect(result["cells"], "compensation_seconds")
    lines = []
    for key, values in collect(result["cells"]).items():
        if key[0] != study:
            continue
        cells = []
        for size in sizes:
            if size not in values:
                cells.append("-")
                continue
            seconds = statistics.mean(plain[key][size]) + statistics.mean(extra.get(key, {}).get(size, [0.0]))
            cells.append(f"{seconds:.0f} s: {statistics.mean(values[size]):.1f}")
        lines.append([_way(*key[1:]), *cells])
    lines.sort(key=lambda line: line[0])
    return markdown(["seconds: perplexity", *(f"{100 * s:g} %" for s in sizes)], lines) if lines else ""


def tables(result: Result) -> str:
    """All tables of a result, with what they were measured with."""
    full = with_leads(result)
    identity, setting = result["identity"], result["setting"]
    sizes = sorted({point["asked"] for cell in result["cells"] for point in cell.get("points", ())})
    parts = [
        f"{setting['model']}, {setting['dtype']}, {identity['device']}, commit {identity['commit']}; calibration "
        f"{', '.join(setting['calibration'])} in rows of {setting['seq_len']}; seconds and tokens are medians over "
        "seeds of the longest run."
    ]
    measures = [name for name in result["dense"] if name.startswith("perplexity ")]
    for study in STUDIES:
        parts += [by_size(full, study, name) for name in measures]
        parts += [by_size(full, study, LEAD, percent=True)]
        parts += [accuracy(full, study, size) for size in sizes]
        parts += [time_curve(full, study)]
    failed = [f"- {c['study']}/{c['name']}/{c['seed']}: {c['error']}" for c in result["cells"] if "error" in c]
    return "\n\n".join([*filter(None, parts), *(["Failed:\n\n" + "\n".join(failed)] if failed else [])])


def merged(results: list[Result]) -> Result:
    """Results of one model as one; a cell of several is the last one's.

    Raises:
        GispError: results of different settings.
    """
    first = results[0]
    for other in results[1:]:
        changed = next((k for k in first["setting"] if other["setting"].get(k) != first["setting"][k]), None)
        if changed is not None:
            raise GispError(f"the results differ in {changed}: give those of one setting")
    cells = {(c["study"], c["name"], c["seed"]): c for result in results for c in result["cells"]}
    return {**first, "cells": list(cells.values())}


def _way(name: str, extra: str) -> str:
    return f"{name} + {extra}" if extra else name


def _at(values: Values, size: float, sign: int) -> float:
    return statistics.mean(values[size]) if size in values else sign * float("inf")


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        GispError: unreadable results, or some without figures.
    """
    options = Parser(prog="python -m benchmarks.quality.markdown", description=__doc__.splitlines()[0])
    options.add_argument("results", nargs="+", type=Path)
    options.add_argument("--png", type=Path, metavar="FILE", help="also draw perplexity and the lead over guessing")
    args = options.parse_args(argv)
    found = [read_json(path, "quality") for path in args.results]
    for path, each in zip(args.results, found, strict=True):
        if "perplexity" not in each.get("dense", {}) or "setting" not in each:
            raise GispError(f"{path} has no figures of the dense model: run the study on it to the end")
    result = merged(found)
    print(tables(result))
    if args.png:
        from benchmarks.quality.plots import write_picture

        write_picture(with_leads(result), args.png)
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
