"""What compensation after pruning gives back, on held-out tokens.

    python -m benchmarks.studies.compensation RUN --calibration C --evaluation E --name "24M MHA decoder" --out R.json

For every sparsity and method: perplexity of the dense, the pruned and the compensated model, and the fraction of the
excess perplexity (pruned over dense) that is gone. At the last sparsity also other targets, calibration sizes and
dampings. Results are written after every measurement.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.command import Parser, check_writable, count, exit_code, numbers, write_json
from benchmarks.common.identity import identity
from gisp.compensation import Compensation, compensate
from gisp.data import Sequences, load_sequences
from gisp.evaluate import perplexity
from gisp.run.trajectory import Trajectory, move_to

NAME = "python -m benchmarks.studies.compensation"
# Means, slopes and scales need few tokens: they are fitted on a quarter of those of least squares.
METHODS = [
    ("lsq", "dense", 1),
    ("lsq", "local", 1),
    ("rescale", "dense", 4),
    ("affine", "local", 4),
    ("bias", "local", 4),
]


def configurations(sparsities: list[float], tokens: int) -> list[tuple[float, dict[str, Any]]]:
    """Every measurement: sparsity and options."""
    last = sparsities[-1]
    found = [(s, {"method": m, "target": t, "tokens": tokens // part}) for s in sparsities for m, t, part in METHODS]
    found += [(last, {"method": m, "target": "dense", "tokens": tokens // 4}) for m in ("bias", "affine")]
    found += [(last, {"method": "rescale", "target": "local", "tokens": tokens // 4})]
    found += [(last, {"method": "lsq", "tokens": tokens, "intercept": True})]
    found += [(last, {"method": "lsq", "tokens": tokens // 4, "damping": d}) for d in (0.01, 0.1, 0.5)]
    found += [(last, {"method": "lsq", "tokens": tokens, "damping": d}) for d in (0.01, 0.1, 2.0)]
    found += [(last, {"method": "lsq", "tokens": tokens * 4, "damping": d}) for d in (0.5, 0.1)]
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and write; 0."""
    args = _parser().parse_args(argv)
    check_writable(args.out)
    trajectory = Trajectory.load(args.run)
    model = trajectory.load_base(device=args.device, dtype=args.dtype)
    vocab_size = model.get_input_embeddings().num_embeddings
    rows = load_sequences(args.evaluation, vocab_size=vocab_size, seq_len=None, held_out=True).rows
    held_out = Sequences.plain(list(rows[args.skip :][: args.rows]))
    dense = perplexity(model, held_out, args.window)
    points: list[dict[str, Any]] = []
    config = trajectory.config
    result = {
        "benchmark": "compensation",
        "identity": identity(torch.device(args.device)),
        "model": args.name,
        "run": {key: config[key] for key in ("preset", "criterion")} | {"steps": len(trajectory.steps)},
        "dtype": args.dtype,
        "window": args.window,
        "evaluation": {"rows": [args.skip, args.skip + len(held_out)], "tokens": dense.tokens},
        "dense": dense.perplexity,
        "points": points,
    }
    shrinkable = trajectory.shrinkable(model)
    pruned: dict[int, float] = {}
    for sparsity, chosen in configurations(numbers("--sparsities", args.sparsities, float), args.tokens):
        step = trajectory.step_for(sparsity)
        move_to(shrinkable, trajectory, step)
        if step not in pruned:
            pruned[step] = perplexity(model, held_out, args.window).perplexity
        start = time.perf_counter()
        done = compensate(model, args.calibration, **chosen)
        seconds = time.perf_counter() - start
        after = perplexity(model, held_out, args.window).perplexity
        excess = (pruned[step] - after) / (pruned[step] - dense.perplexity)
        found = {"pruned": pruned[step], "compensated": after, "excess_removed": excess}
        point = {"sparsity": trajectory.sparsity_at(step), **_described(done), **found}
        points.append({**point, "fit_seconds": round(seconds, 1)})
        print(points[-1], flush=True)
        write_json(args.out, result)
    return 0


def _described(done: Compensation) -> dict[str, Any]:
    """Method and setting of a compensation, JSON-ready."""
    options = done.options
    return {
        "method": options.method,
        "target": options.target,
        "intercept": any(map(options.biases, options.methods)),
        "damping": options.damping,
        "calibration_tokens": done.seen,
        "kept": [result.name for result in done.results if result.kept],
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True, help="held-out tokens")
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sparsities", default="0.2,0.3,0.4,0.5")
    parser.add_argument("--tokens", type=count, default=32768, help="calibration tokens of least squares")
    parser.add_argument("--skip", type=int, default=0, help="first held-out rows to leave out")
    parser.add_argument("--rows", type=count, help="held-out rows used, all by default")
    parser.add_argument("--window", type=count, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
