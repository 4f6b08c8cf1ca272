"""The quality study on one decoder.

    python -m benchmarks.quality MODEL --calibration a.jsonl --calibration b.jsonl --evaluation wikitext2-test.txt
        --tasks tasks.json.xz --task-rows 600 --gpus 4 --jobs 4 --budget 540 --out R.json
    python -m benchmarks.quality --train DIR --corpus TEXT --train-seconds 150 --out R.json

Cells of the studies (criteria, fast, compensation, task) run over several seeds; what --out holds already is not run
again. benchmarks.quality.prepare makes the file of tasks, benchmarks.quality.markdown tables and a picture of results.
Without a GPU give --quick: one third of the steps, fewer tokens and variants.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.command import Budget, check_writable, exit_code, read_json, write_json
from benchmarks.common.identity import identity
from benchmarks.decoders.decoder import described
from benchmarks.quality import summary
from benchmarks.quality.cells import DENSE
from benchmarks.quality.options import chosen, parser, read_bench, shares_heads, task_names
from benchmarks.quality.pool import run_cells
from benchmarks.quality.runner import Bench
from gisp.errors import GispError


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if a cell failed.

    Raises:
        GispError: bad options or unreadable files.
    """
    args = parser(__doc__).parse_args(argv)
    if args.quick:
        args.seeds, args.steps, args.exact_tokens, args.exact_steps = 1, 60, 8192, 30
        args.evaluation_rows = args.evaluation_rows or 64
    if args.list:
        print("\n".join(cell.key for cell in chosen(args, gqa=True, tasks=task_names(args.tasks))))
        return 0
    if args.plot and not args.out:
        raise GispError("--plot writes beside a result: give --out")
    check_writable(args.out)
    budget = Budget(args.budget)
    bench = read_bench(args)
    result = _begun(args.out, bench)
    _run(args, bench, result, budget)
    print(summary.report(result))
    if args.plot:
        from benchmarks.quality.plots import write_plots

        for path in write_plots(result, args.out):
            print(f"wrote {path}")
    return 1 if any("error" in cell for cell in (result["dense"], *result["cells"])) else 0


def _begun(out: Path | None, bench: Bench) -> dict[str, Any]:
    """A result to go on with, the one in ``--out`` where there is one.

    Raises:
        GispError: it was made with other data or settings.
    """
    setting = bench.describe()
    result: dict[str, Any] = {"benchmark": "quality", "dense": {}, "cells": []}
    if out and out.exists():
        result = read_json(out, "quality")
        before = result.get("setting", {})
        changed = next((key for key in setting if before.get(key) != setting[key]), None)
        if changed is not None:
            raise GispError(
                f"{out} was made with {changed} {before.get(changed)}, not {setting[changed]}: give another --out"
            )
    training = described(Path(bench.model))
    return {**result, "identity": identity(torch.device(bench.device)), "setting": setting, "training": training}


def _run(args: argparse.Namespace, bench: Bench, result: dict[str, Any], budget: Budget) -> None:
    """Run what a result lacks, and write it after every cell."""
    done = {summary.key(cell) for cell in result["cells"] if "error" not in cell}
    cells = chosen(args, shares_heads(bench.model), task_names(bench.tasks))
    todo = [cell for cell in cells if cell.key not in done]
    if "perplexity" not in result["dense"]:
        todo.insert(0, DENSE)

    def keep(found: dict[str, Any]) -> None:
        if found["study"] == DENSE.study:
            result["dense"] = found
            told = found.get("error") or f"perplexity {found['perplexity']:.3f}, {found['parameters']:,} parameters"
        else:
            key = summary.key(found)
            result["cells"] = [cell for cell in result["cells"] if summary.key(cell) != key] + [found]
            values = [point["perplexity"] for point in found.get("points", []) if point["compensation"] is None]
            told = found.get("error") or str([round(value, 2) for value in values])
        print(f"{budget.spent:6.0f} s  {summary.key(found):50s} {told}", flush=True)
        if args.out:
            write_json(args.out, result)

    left = run_cells(bench, todo, jobs=args.jobs, gpus=args.gpus, budget=budget, on_result=keep)
    if left:
        print(f"{len(left)} of {len(todo)} cells left out, the budget is spent")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
