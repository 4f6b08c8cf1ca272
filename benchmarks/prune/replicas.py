"""The same run by several GPUs that score every step together, beside one GPU with and without slices."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.command import Budget, table
from benchmarks.common.identity import ROOT
from benchmarks.common.registry import MODELS
from benchmarks.common.synthetic import build_model, random_tokens
from benchmarks.prune.measure import LENGTH, Setting, timed_run
from gisp.config.options import SLICES
from gisp.errors import GispError
from gisp.replicas.environment import joined, rank
from gisp.replicas.launch import check_processes, launch

_SEQUENCES = 2000
# Steps whose median stands for the dense and for the final model.
_WINDOW = 5


def counts_of(text: str) -> list[int]:
    """``1,2,4`` as numbers of GPUs."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers: give 1,2,4") from None
    if min(counts) < 1 or max(counts) > SLICES:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers from 1 to {SLICES}")
    return counts


def measure_replicas(names: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs of every model, each in fresh processes: plain on one GPU, then in slices on so many.

    Raises:
        GispError: there are fewer GPUs.
    """
    check_processes(max(args.gpus), args.device)
    paths = (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for count, slices in ((1, None), *((count, SLICES) for count in args.gpus)):
                print(f"{name}: {count} GPUs, {'one slice' if slices is None else f'{slices} slices'}", flush=True)
                out = Path(folder) / "run.json"
                given = ["--model", name, "--device", args.device, "--sparsity", str(args.sparsity), "--out", str(out)]
                given += [f"--steps={args.steps}"] if args.steps else []
                given += [f"--batch-tokens={args.batch_tokens}"] if args.batch_tokens else []
                code = launch(count, "benchmarks.prune", [*given, *(["--gpus", str(count)] if slices else [])])
                if code:
                    raise GispError(f"the run of {name} on {count} GPUs ended with exit code {code}")
                runs.append({"model": name, "gpus": count, "slices": slices, **json.loads(out.read_text())})
                out.unlink()
    return runs


def run_replica(args: argparse.Namespace) -> int:
    """One process of such a run; the first one writes what it took to ``--out``."""
    (name,) = args.model
    with joined(args.device) as group:
        on_gpu = args.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        setting = Setting.make(device, args.sparsity, args.steps, args.batch_tokens)
        model = build_model(MODELS[name], device, torch.bfloat16 if on_gpu else torch.float32)
        tokens = random_tokens(MODELS[name], _SEQUENCES if on_gpu else 64, LENGTH)
        shared = group if args.gpus else None
        found = timed_run(MODELS[name], model, tokens, setting, None, Budget(None), shared)
    if rank() == 0:
        rows = found.pop("step_rows")
        seconds = [row["step_seconds"] for row in rows]
        # The first steps also compile kernels.
        found["step_seconds_dense"] = statistics.median(seconds[1 : 1 + _WINDOW] or seconds)
        found["step_seconds_end"] = statistics.median(seconds[1:][-_WINDOW:] or seconds)
        Path(args.out).write_text(json.dumps(found))
    return 0


def show_replicas(runs: list[dict[str, Any]]) -> str:
    """The table of such runs; ratios are to the plain run of the model on one GPU."""
    lines = []
    for run in runs:
        plain = next(r for r in runs if r["model"] == run["model"] and r["slices"] is None)
        sliced = next(r for r in runs if r["model"] == run["model"] and r["slices"] is not None)
        same = "-" if run["slices"] is None else str(run["removed_sha256"] == sliced["removed_sha256"]).lower()
        lines.append(
            [
                run["model"],
                str(run["gpus"]),
                str(run["slices"] or "-"),
                f"{run['seconds']:.1f}",
                f"{plain['seconds'] / run['seconds']:.2f}",
                f"{run['step_seconds_dense']:.3f}",
                f"{plain['step_seconds_dense'] / run['step_seconds_dense']:.2f}",
                f"{run['step_seconds_end']:.3f}",
                f"{plain['step_seconds_end'] / run['step_seconds_end']:.2f}",
                same,
            ]
        )
    header = ("model", "GPUs", "slices", "seconds", "times faster", "dense step s", "times", "last steps s", "times")
    return table((*header, "same run"), lines) if lines else ""
