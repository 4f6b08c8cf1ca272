"""Scores around a backward pass, beside the ways of other libraries.

Decoder layers of real shape with random weights, without embeddings to learn and without an output projection. Scores
of |w * grad|: gradients kept in .grad and summed eagerly, Torch-Pruning's and LLM-Pruner's own code where installed,
record_importance. Gradients of gates: a gate parameter on every structure under autograd, gate gradients of
record_importance. Ways that make the same scores are compared with each other before they are timed in turns; a wrong
one is reported and not timed. Memory is the peak above that of the pass alone, which keeps the inputs of all scored
layers and makes no weight gradient.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.common.command import (
    Parser,
    add_result_options,
    count,
    models_and_device,
    numbers,
    reading,
    result_of,
    table,
)
from benchmarks.common.compare import regressed
from benchmarks.common.goals import goal_table
from benchmarks.common.identity import identity
from benchmarks.common.registry import MODELS
from benchmarks.common.task import Row
from benchmarks.embed.goals import embed_goals, embed_ratios
from benchmarks.embed.measure import measure_ways
from benchmarks.embed.subject import build_decoder, make_subject
from benchmarks.embed.ways import PASS
from gisp.errors import GispError

NAME = "gisp bench embed"
EMBEDDED = ("llama-2-13b", "llama-2-7b")
TOKENS = "512,1024,2048,8192"


def measure(names: list[str], layers: int, tokens: list[int], repetitions: int, device: torch.device) -> list[Row]:
    """Rows of every model and number of tokens."""
    rows: list[Row] = []
    for name in names:
        model = MODELS[name]
        decoder = build_decoder(model, min(layers, model.layers), device)
        for number in tokens:
            subject = make_subject(model, decoder, number)
            labels = {"model": name, "layers": min(layers, model.layers), "tokens": subject.ids.numel()}
            rows += [{**labels, **row} for row in measure_ways(subject, repetitions)]
            print(f"{name}, {number} tokens: done", flush=True)
            del subject
        del decoder
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def show(rows: list[Row]) -> str:
    """The table of a result."""
    alone = {(row["model"], row["tokens"]): row["median_ms"] for row in rows if row["way"] == PASS and "red" not in row}
    lines = []
    for row in rows:
        start = [f"{row['model']}, {row['layers']} layers", f"{row['tokens']}", row["way"]]
        if "red" in row:
            lines.append([*start, "WRONG, not timed", "", row["red"], ""])
            continue
        floor = alone.get((row["model"], row["tokens"]))
        extra = row["extra_bytes"]
        lines.append(
            [
                *start,
                f"{row['median_ms']:.2f} ({row['q1_ms']:.2f} to {row['q3_ms']:.2f})",
                "-" if floor is None else f"{row['median_ms'] - floor:.2f}",
                f"{row['speedup']:.2f}x over {row['baseline']}" if "speedup" in row else "",
                "-" if extra is None else f"{extra / 1e6:.0f}",
            ]
        )
    return table(("model", "tokens", "way", "ms (quartiles)", "above the pass", "", "MB above the pass"), lines)


def parser() -> argparse.ArgumentParser:
    options = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(MODELS)
    options.add_argument(
        "--model", action="append", metavar="NAME", help=f"{known}; repeatable ({' and '.join(EMBEDDED)})"
    )
    options.add_argument("--layers", type=count, default=8, help="of the model that are built and scored (8)")
    options.add_argument("--tokens", default=TOKENS, help=f"of a pass ({TOKENS})")
    options.add_argument("--repetitions", type=count, default=10, help="of every way, in 5 turns (10)")
    options.add_argument("--device", default="auto", help="auto, cpu or cuda; a CPU takes tiny alone")
    add_result_options(options, plots=False)
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if a way was wrong or a ratio is worse than before.

    Raises:
        GispError: bad options, or no GPU for a real model.
    """
    args = parser().parse_args(argv)
    result = result_of(args, "embed", lambda: _measure(args), embed_ratios)
    with reading(args.source):
        print(show(result["rows"]))
        if args.goals:
            print(goal_table(embed_goals(result["rows"])))
    slower = regressed(args, result, embed_ratios)
    return 1 if slower or any("red" in row for row in result["rows"]) else 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    tokens = numbers("--tokens", args.tokens, int)
    if not all(number > 0 for number in tokens):
        raise GispError(f"--tokens is {args.tokens!r}: give numbers above 0")
    args.model = args.model or list(EMBEDDED)
    names, device = models_and_device(args, NAME)
    rows = measure(names, args.layers, tokens, args.repetitions, device)
    return {"benchmark": "embed", "identity": identity(device), "rows": rows}
