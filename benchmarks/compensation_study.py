"""What compensation after pruning gives back, on held-out tokens.

    python benchmarks/compensation_study.py RUN --calibration DATA --data DATA --name "24M MHA decoder" --out FILE.json

For every sparsity and method: perplexity of the dense, the pruned and the compensated model, and the fraction of the
excess perplexity (pruned over dense) that is gone. At the highest sparsity also other calibration sizes and dampings.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from gisp.compensation import compensate
from gisp.data import load_sequences
from gisp.evaluate import perplexity
from gisp.files import write_atomic
from gisp.trajectory import Trajectory, move_to

METHODS = [("bias", "local"), ("affine", "local"), ("lsq", "local"), ("lsq", "dense")]


def configurations(sparsities: list[float], tokens: int, sizes: list[int]) -> list[tuple[float, dict[str, Any]]]:
    """Every measurement: sparsity and options."""
    found = [(s, {"method": m, "target": t, "tokens": tokens}) for s in sparsities for m, t in METHODS]
    last = sparsities[-1]
    found += [(last, {"method": m, "target": "dense", "tokens": tokens}) for m in ("bias", "affine")]
    found += [(last, {"method": "lsq", "target": "dense", "tokens": tokens, "intercept": True})]
    found += [(last, {"method": "lsq", "target": "dense", "tokens": tokens, "damping": d}) for d in (1e-4, 1e-3, 0.1)]
    found += [(last, {"method": "lsq", "target": t, "tokens": n}) for n in sizes for t in ("local", "dense")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True, help="held-out tokens")
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--sizes", type=int, nargs="*", default=[8192, 131072])
    parser.add_argument("--rows", type=int, help="held-out rows, all by default")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    trajectory = Trajectory.load(options.run)
    model = trajectory.load_base(device=options.device, dtype=options.dtype)
    vocab_size = model.get_input_embeddings().num_embeddings
    held_out = load_sequences(options.data, vocab_size=vocab_size, seq_len=None, held_out=True).first(options.rows)

    def measure() -> float:
        return perplexity(model, held_out, options.window).perplexity

    dense = perplexity(model, held_out, options.window)
    shrinkable = trajectory.shrinkable(model)
    result: dict[str, Any] = {
        "model": options.name,
        "preset": trajectory.config["preset"],
        "steps": len(trajectory.steps),
        "device": options.device,
        "dtype": options.dtype,
        "window": options.window,
        "evaluation_tokens": dense.tokens,
        "dense": dense.perplexity,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "points": [],
    }
    pruned: dict[int, float] = {}
    for sparsity, chosen in configurations(options.sparsities, options.tokens, options.sizes):
        step = trajectory.step_for(sparsity)
        move_to(shrinkable, trajectory, step)
        if step not in pruned:
            pruned[step] = measure()
        start = time.perf_counter()
        done = compensate(model, options.calibration, **chosen)
        seconds = time.perf_counter() - start
        after = measure()
        result["points"].append(
            {
                "sparsity": trajectory.sparsity_at(step),
                "method": done.options.method,
                "target": done.options.target,
                "intercept": done.options.intercept,
                "damping": done.options.damping if done.options.method == "lsq" else None,
                "calibration_tokens": done.tokens,
                "pruned": pruned[step],
                "compensated": after,
                "excess_removed": (pruned[step] - after) / (pruned[step] - dense.perplexity),
                "fit_seconds": round(seconds, 1),
            }
        )
        write_atomic(options.out, json.dumps(result, indent=1).encode())
        print(json.dumps(result["points"][-1]), flush=True)


if __name__ == "__main__":
    main()
