"""Kernels on real shapes, against what plain PyTorch offers.

Every implementation is first compared with the plain torch version and the float64 truth on the very inputs to be
timed; a wrong one is reported and not timed. Ceilings (8192^3 bfloat16 product, copy of 2 GiB) are measured in the same
run. Inputs are never in the second-level cache.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.common.command import (
    Budget,
    Parser,
    add_result_options,
    check_plot,
    positive,
    reading,
    require_gpu,
    result_of,
)
from benchmarks.common.compare import regressed
from benchmarks.common.goals import goal_table
from benchmarks.common.identity import identity
from benchmarks.common.measure import ceilings
from benchmarks.common.task import Row, Task, describe, first_line, run_task
from benchmarks.kernels import sweep
from benchmarks.kernels.goals import kernel_goals, kernel_ratios
from benchmarks.kernels.tasks import compaction, decoder, float8, gates, importance, products, recording
from gisp.errors import GispError

NAME = "gisp bench kernels"


def all_tasks(quick: bool = False) -> list[Task]:
    """Every task; those a goal is about come first."""
    modules = (compaction, importance, gates, recording, decoder, float8, products)
    return [task for module in modules for task in module.tasks(quick)]


def chosen(tasks: list[Task], only: list[str]) -> list[Task]:
    """Tasks whose name holds one of the given words, all for none.

    Raises:
        GispError: a word that no task holds.
    """
    for word in only:
        if not any(word in task.name for task in tasks):
            ops = ", ".join(dict.fromkeys(task.op for task in tasks))
            raise GispError(f"--only {word!r} matches no benchmark: give a part of a name, there are {ops}")
    return [task for task in tasks if not only or any(word in task.name for word in only)]


def run(tasks: list[Task], budget: Budget) -> dict[str, Any]:
    """Rows of all tasks, or of those that began within the budget.

    Raises:
        GispError: no GPU.
    """
    require_gpu(NAME)
    torch.manual_seed(0)
    peak = ceilings()
    print(f"ceilings: {peak.matmul_tflops:.0f} TFLOP/s bfloat16 8192^3, {peak.copy_gbs:.0f} GB/s copy")
    print("the last column is peak memory above the inputs; speed-ups are over the plain version of an op")
    rows: list[Row] = []
    done = 0
    for task in tasks:
        if budget.over:
            print(f"budget of {budget.seconds:g} s is spent: {len(tasks) - done} of {len(tasks)} benchmarks left out")
            break
        try:
            more = run_task(task, peak)
        except RuntimeError as error:
            # Out of memory, or a kernel that broke the device: what was measured before is kept.
            more = [{"op": task.op, **task.labels, "implementation": "all", "red": first_line(error)}]
        rows += more
        done += 1
        for row in more:
            print(describe(row), flush=True)
        # A device that broke refuses this too.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return {
        "benchmark": "kernels",
        "identity": identity(torch.device("cuda")),
        "ceilings": asdict(peak),
        "seconds": budget.spent,
        "left_out": [task.name for task in tasks[done:]],
        "rows": rows,
    }


def parser() -> argparse.ArgumentParser:
    options = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_result_options(options, plots=True)
    options.add_argument("--quick", action="store_true", help="a few shapes, under a minute")
    options.add_argument("--only", action="append", default=[], metavar="NAME", help="part of a name; may be repeated")
    options.add_argument(
        "--budget", type=positive, metavar="SECONDS", help="begin nothing after that; keep what is done"
    )
    options.add_argument("--sweep", action="store_true", help="instead, other tile configurations of the Triton kernel")
    options.add_argument("--list", action="store_true", help="print the names and stop")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if an implementation was wrong or a ratio is worse than before.

    Raises:
        GispError: bad options, or no GPU.
    """
    args = parser().parse_args(argv)
    tasks = chosen(sweep.tasks() if args.sweep else all_tasks(args.quick), args.only)
    if args.list:
        print("\n".join(task.name for task in tasks))
        return 0
    check_plot(args)
    budget = Budget(args.budget)
    result = result_of(args, "kernels", lambda: run(tasks, budget), kernel_ratios)
    with reading(args.source):
        return _shown(args, result)


def _shown(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """Print and draw a result; the exit code."""
    if args.goals:
        print(goal_table(kernel_goals(result.get("rows", []))))
    if args.plot:
        from benchmarks.kernels.plots import write_plots

        for path in write_plots(result, args.out or args.source):
            print(f"wrote {path}")
    slower = regressed(args, result, kernel_ratios)
    return 1 if slower or any("red" in row for row in result.get("rows", [])) else 0
