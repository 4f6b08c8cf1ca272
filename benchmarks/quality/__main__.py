"""The quality study on one decoder.

    python -m benchmarks.quality MODEL --calibration C.safetensors --evaluation E.safetensors --out R.json
    python -m benchmarks.quality --train DIR --corpus TEXT --train-seconds 150 --out R.json

Cells of the studies (criteria, fast, compensation, task) run over several seeds; what --out holds already is not run
again. Without a GPU give --quick: one third of the steps, fewer tokens and variants.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common.command import (
    Budget,
    Parser,
    check_writable,
    count,
    exit_code,
    numbers,
    positive,
    read_json,
    write_json,
)
from benchmarks.common.identity import identity
from benchmarks.decoders.decoder import Decoder, described, train_decoder
from benchmarks.quality import summary
from benchmarks.quality.cells import STUDIES, Cell, Sizes
from benchmarks.quality.pool import run_cells
from benchmarks.quality.runner import Bench, Runner
from gisp.errors import GispError
from gisp.model.load import resolve_device, resolve_dtype

NAME = "python -m benchmarks.quality"


def parser() -> argparse.ArgumentParser:
    options = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", nargs="?", type=Path, help="folder of a trained decoder")
    options.add_argument("--calibration", type=Path, help="token file; of --train its own")
    options.add_argument("--evaluation", type=Path, help="token file; of --train its own")
    options.add_argument(
        "--train", type=Path, metavar="DIR", help="instead of MODEL, train one of 65M parameters there"
    )
    options.add_argument("--corpus", type=Path, help="text to train on: a folder of Python source or a .jsonl.gz")
    options.add_argument("--train-seconds", type=positive, help="shorten the training to this time")
    options.add_argument("--study", action="append", choices=STUDIES, help="repeatable, in this order (criteria)")
    options.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="part of study/way/seed; repeatable"
    )
    options.add_argument("--seeds", type=count, default=3, help="0 to N-1 (3)")
    options.add_argument("--steps", type=count, default=Sizes.steps, help="of fast (200)")
    options.add_argument("--batch-tokens", type=count, default=Sizes.batch_tokens, help="of a step of fast (8192)")
    options.add_argument("--exact-tokens", type=count, default=Sizes.exact_tokens, help="of exact schedules (163840)")
    options.add_argument("--exact-steps", type=count, default=Sizes.exact_steps, help="of exact schedules (112)")
    options.add_argument(
        "--exact-seeds", type=count, default=Sizes.exact_seeds, help="of them, the costliest by far (3)"
    )
    options.add_argument("--sparsities", default="0.2,0.3,0.4,0.5")
    options.add_argument("--window", type=count, default=256)
    options.add_argument("--evaluation-rows", type=count, help="rows evaluated (all)")
    options.add_argument("--quick", action="store_true", help="a cut for a CPU: 60 steps, 64 rows evaluated, one seed")
    options.add_argument("--jobs", type=count, default=1, help="processes side by side (1)")
    options.add_argument("--budget", type=positive, metavar="SECONDS", help="begin no cell after that")
    options.add_argument("--device", default="auto")
    options.add_argument("--dtype", default=None, help="bfloat16 (default on a GPU) or float32")
    options.add_argument("--out", type=Path, help="JSON file to write or to go on with")
    options.add_argument("--plot", action="store_true", help="also draw PNGs beside --out")
    options.add_argument("--list", action="store_true", help="print the cells and stop")
    return options


def chosen(args: argparse.Namespace, gqa: bool) -> list[Cell]:
    """The cells asked for: study by study, and in each those of one seed before those of the next."""
    sizes = Sizes(args.steps, args.batch_tokens, args.exact_tokens, args.exact_steps, args.exact_seeds, gqa)
    studies = dict.fromkeys(args.study or ["criteria"])
    made = (STUDIES[study](range(args.seeds), sizes) for study in studies)
    found = [cell for each in made for cell in sorted(each, key=lambda cell: cell.seed)]
    found = [cell for cell in found if not args.only or any(word in cell.key for word in args.only)]
    if not found:
        raise GispError(f"--only {', '.join(args.only)} matches no way of pruning: see --list")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if a cell failed.

    Raises:
        GispError: bad options or unreadable files.
    """
    args = parser().parse_args(argv)
    if args.quick:
        args.seeds, args.steps, args.exact_tokens, args.exact_steps = 1, 60, 8192, 30
        args.evaluation_rows = args.evaluation_rows or 64
    if args.list:
        print("\n".join(cell.key for cell in chosen(args, gqa=True)))
        return 0
    if args.plot and not args.out:
        raise GispError("--plot writes beside a result: give --out")
    check_writable(args.out)
    bench = _bench(args)
    result: dict[str, Any] = {"benchmark": "quality", "cells": []}
    if args.out and args.out.exists():
        result = read_json(args.out, "quality")
    dense = _describe(result, bench, choices="task" in (args.study or ()))
    done = {_key(cell) for cell in result["cells"] if "error" not in cell}
    gqa = dense["num_key_value_heads"] < dense["num_attention_heads"]
    todo = [cell for cell in chosen(args, gqa) if cell.key not in done]

    def keep(cell: dict[str, Any]) -> None:
        result["cells"] = [c for c in result["cells"] if _key(c) != _key(cell)] + [cell]
        values = [point["perplexity"] for point in cell.get("points", []) if point["compensation"] is None]
        print(f"{_key(cell):50s} {cell.get('error') or [round(value, 2) for value in values]}", flush=True)
        if args.out:
            write_json(args.out, result)

    left = run_cells(bench, todo, args.jobs, Budget(args.budget), keep)
    if left:
        print(f"{len(left)} of {len(todo)} cells left out, the budget is spent")
    print(summary.report(result))
    if args.plot:
        from benchmarks.quality.plots import write_plots

        for path in write_plots(result, args.out):
            print(f"wrote {path}")
    return 1 if any("error" in cell for cell in result["cells"]) else 0


def _describe(result: dict[str, Any], bench: Bench, *, choices: bool) -> dict[str, Any]:
    """Write into a result what it is of; the dense decoder's figures."""
    runner = Runner(bench)
    dense = {**result.get("dense", {}), **runner.dense(choices=choices)}
    result |= {
        "identity": identity(runner.device),
        "model": bench.decoder.path.name,
        "training": described(bench.decoder.path),
        "dtype": str(resolve_dtype(bench.dtype, runner.device)).removeprefix("torch."),
        "window": bench.window,
        "dense": dense,
    }
    print(
        f"{result['model']}: {dense['parameters']:,} parameters, dense perplexity {dense['perplexity']:.3f}", flush=True
    )
    return dense


def _key(cell: dict[str, Any]) -> str:
    return f"{cell['study']}/{cell['name']}/{cell['seed']}"


def _bench(args: argparse.Namespace) -> Bench:
    sparsities = tuple(sorted(numbers("--sparsities", args.sparsities, float)))
    if args.train is not None:
        if not (args.train / "config.json").exists():
            if args.corpus is None:
                raise GispError("--train needs text: give --corpus")
            train_decoder(args.train, args.corpus, args.train_seconds)
        decoder = Decoder.trained(args.train)
    elif args.model is None or args.calibration is None or args.evaluation is None:
        raise GispError("give MODEL, --calibration and --evaluation, or --train DIR with --corpus")
    else:
        decoder = Decoder(args.model, args.calibration, args.evaluation)
    device = resolve_device(args.device)
    return Bench(decoder, sparsities, args.window, args.evaluation_rows, str(device), args.dtype)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
