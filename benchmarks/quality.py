"""Perplexity of preset fast beside one-shot and uniform per-layer pruning, with equal calibration tokens.

    python -m benchmarks.quality MODEL --calibration C.safetensors --evaluation E.safetensors --out RESULT.json

Every method ranks with the same scores (|W * G|, normalised by parameters), protects the same layers and keeps widths
to the same multiple. One-shot removes everything after one exact pass over as many tokens as the whole run of ``fast``
saw, or as there are. Uniform takes the same scores and removes the same fraction of every layer's heads and channels.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.identity import identity
from gisp.config import make_config
from gisp.data import Sequences, load_sequences
from gisp.evaluate import perplexity
from gisp.loop import prune
from gisp.model_io import load_dense, resolve_device, resolve_dtype
from gisp.one_shot import one_shot
from gisp.structures import map_model


@dataclass(frozen=True)
class Row:
    """One method at one sparsity."""

    method: str
    sparsity: float
    perplexity: float
    calibration_tokens: int
    seconds: float


class Study:
    """One model with its calibration and evaluation tokens."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path = str(arguments.model)
        self.device = resolve_device(arguments.device)
        self.dtype = resolve_dtype(arguments.dtype, self.device)
        self.window = int(arguments.window)
        self.steps = int(arguments.steps)
        self.batch_tokens = int(arguments.batch_tokens)
        self.rows: list[Row] = []
        vocab_size = map_model(self.load()).vocab_size
        self.calibration = load_sequences(arguments.calibration, vocab_size=vocab_size, seq_len=None)
        self.evaluation = load_sequences(arguments.evaluation, vocab_size=vocab_size, seq_len=None)

    def load(self) -> Any:
        return load_dense(self.path, self.device, self.dtype)

    def add(self, method: str, sparsity: float, model: Any, tokens: int, started: float) -> None:
        seconds = time.perf_counter() - started
        result = perplexity(model, self.evaluation, self.window)
        row = Row(method, sparsity, result.perplexity, tokens, seconds)
        self.rows.append(row)
        print(f"{method:10} {sparsity:7.4f} {row.perplexity:10.3f} {tokens:12,} {seconds:8.1f}", flush=True)

    def fast(self, sparsities: list[float], seed: int) -> int:
        """One run; every sparsity is a point of it. Returns the calibration tokens it used."""
        model, started = self.load(), time.perf_counter()
        options = {"steps": self.steps, "batch_tokens": self.batch_tokens, "seed": seed}
        trajectory = prune(model, self.calibration, sparsity=max(sparsities), **options)
        seconds = time.perf_counter() - started
        for sparsity in sparsities:
            step = trajectory.step_for(sparsity)
            spent = sum(record.tokens for record in trajectory.steps[:step])
            done = time.perf_counter() - seconds * step / len(trajectory.steps)
            self.add(f"fast/{seed}", trajectory.sparsity_at(step), trajectory.at(sparsity, model), spent, done)
        return sum(record.tokens for record in trajectory.steps)

    def one_shot(self, method: str, sparsities: list[float], tokens: int) -> None:
        """The baselines: one global ranking, or the same fraction of every layer."""
        data, config = self._sized(tokens), make_config()
        used, started = sum(len(ids) for ids, _ in data.rows), time.perf_counter()
        for reached, model in one_shot(self.load(), data, sparsities, config, uniform=method == "uniform"):
            self.add(method, reached, model, used, started)

    def _sized(self, tokens: int) -> Sequences:
        """The first sequences holding ``tokens`` tokens, or all there are."""
        per_row = len(self.calibration.rows[0][0])
        return self.calibration.first(max(1, tokens // per_row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sparsities", default="0.2,0.3,0.4,0.5")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default=None)
    arguments = parser.parse_args()
    sparsities = [float(value) for value in arguments.sparsities.split(",")]
    study = Study(arguments)
    print(f"{'method':10} {'sparsity':>7} {'perplexity':>10} {'tokens':>12} {'seconds':>8}")
    study.add("dense", 0.0, study.load(), 0, time.perf_counter())
    tokens = max(study.fast(sparsities, seed) for seed in range(arguments.seeds))
    for method in ("one-shot", "uniform"):
        study.one_shot(method, sparsities, tokens)
    result = {
        "identity": identity(study.device),
        "model": Path(study.path).name,
        "dtype": str(study.dtype).removeprefix("torch."),
        "window": study.window,
        "steps": study.steps,
        "batch_tokens": study.batch_tokens,
        "rows": [asdict(row) for row in study.rows],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
