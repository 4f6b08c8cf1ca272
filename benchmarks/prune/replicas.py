"""The same run by several GPUs that score every step together, beside one GPU with and without slices."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.command import Budget, table, write_json
from benchmarks.common.identity import ROOT, identity
from benchmarks.common.measure import quartiles
from benchmarks.common.registry import MODELS
from benchmarks.common.synthetic import build_model, random_tokens
from benchmarks.prune.goals import GIGABYTE
from benchmarks.prune.measure import LENGTH, WINDOW, Setting, timed_run
from gisp.config.options import SLICES
from gisp.errors import GispError
from gisp.replicas.agreement import agree
from gisp.replicas.environment import joined
from gisp.replicas.group import Replicas
from gisp.replicas.launch import check_processes, launch

_SEQUENCES = 2000


def counts_of(text: str) -> list[int]:
    """``1,2,4`` as numbers of GPUs."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers: give 1,2,4") from None
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers from 1 on")
    return counts


def check_shared(args: argparse.Namespace) -> None:
    """Refuse options that runs by several GPUs do not follow.

    Raises:
        GispError: names the option, or there are fewer GPUs than asked for.
    """
    for option in ("budget", "criterion", "compensate", "plot", "goals"):
        if getattr(args, option):
            raise GispError(f"--{option} does not go with --gpus, which times whole runs of preset fast: leave it out")
    slices = args.slices or SLICES
    # Stages hand slices on to one another, and need none each.
    if not args.stages and slices < max(args.gpus):
        raise GispError(f"--slices {slices} is less than {max(args.gpus)} GPUs: each needs one, give more")
    check_processes(max(args.gpus), args.device)


def measure_replicas(
    names: list[str], args: argparse.Namespace, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Runs of every model, each in fresh processes: plain on one GPU, then in slices on so many.

    Args:
        keep: called with the result so far after every run.

    Returns:
        The result, JSON-ready. ``same`` of a run in slices says whether it is bit for bit the first one in slices.

    Raises:
        GispError: a run failed.
    """
    paths = (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    result: dict[str, Any] = {"benchmark": "prune", "identity": None, "runs": [], "replicas": []}
    for name in names:
        digest = None
        for count, slices in ((1, None), *((count, args.slices or SLICES) for count in args.gpus)):
            print(f"{name}: {count} GPUs, {'one slice' if slices is None else f'{slices} slices'}", flush=True)
            found = _one_run(name, count, slices, args)
            result["identity"] = result["identity"] or found["identity"]
            del found["identity"]
            if slices is not None:
                digest = digest or found["trajectory_sha256"]
                found["same"] = found["trajectory_sha256"] == digest
            result["replicas"].append({"model": name, "gpus": count, "slices": slices, **found})
            keep(result)
    return result


def _one_run(name: str, count: int, slices: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """What the first process of one run wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        given = ["--model", name, "--device", args.device, "--sparsity", str(args.sparsity), "--out", str(out)]
        given += [f"--steps={args.steps}"] if args.steps else []
        given += [f"--batch-tokens={args.batch_tokens}"] if args.batch_tokens else []
        given += ["--fp8"] if args.fp8 else []
        given += [f"--gpus={count}", f"--slices={slices}"] if slices else []
        code = launch(count, "benchmarks.prune", given, again="start it again")
        if code:
            raise GispError(f"the run of {name} on {count} GPUs ended with exit code {code}")
        return dict(json.loads(out.read_text()))


def run_replica(args: argparse.Namespace) -> int:
    """One process of such a run; the first one writes what it took to ``--out``.

    Raises:
        GispError: processes of the run removed different structures.
    """
    (name,) = args.model
    with joined(args.device) as group:
        on_gpu = args.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        setting = Setting.make(device, args.sparsity, args.steps, args.batch_tokens, args.fp8)
        model = build_model(MODELS[name], device, torch.bfloat16 if on_gpu else torch.float32)
        tokens = random_tokens(MODELS[name], _SEQUENCES if on_gpu else 64, LENGTH)
        shared: dict[str, Any] = {"group": group, "slices": args.slices} if args.gpus else {}
        found = timed_run(MODELS[name], model, tokens, setting, None, Budget(None), **shared)
        replicas = Replicas(group)
        agree(replicas, {"trajectory": found["trajectory_sha256"]})
        machine = identity(device)
        cards = [card.decode() for card in replicas.exchange(machine["device"].encode())]
    if replicas.first:
        rows = found.pop("step_rows")
        # The first steps also compile kernels.
        seconds = [row["step_seconds"] for row in rows[1:] or rows]
        found["later_seconds"] = sum(seconds)
        found["step_seconds_dense"] = statistics.median(seconds[:WINDOW])
        found["step_quartiles_dense"] = quartiles(seconds[:WINDOW])
        found["step_seconds_end"] = statistics.median(seconds[-WINDOW:])
        write_json(Path(args.out), {"identity": machine, "cards": cards, **found})
    return 0


def all_same(result: dict[str, Any]) -> bool:
    """Whether all runs in slices of a result are the same, model by model."""
    return all(run.get("same", True) for run in result.get("replicas", []))


def show_replicas(runs: list[dict[str, Any]]) -> str:
    """The table of such runs; ratios are to the plain run of the model on one GPU, of all steps but the first."""
    lines = []
    for run in runs:
        plain = next(r for r in runs if r["model"] == run["model"] and r["slices"] is None)
        lines.append(
            [
                run["model"],
                str(run["gpus"]),
                str(run["slices"] or "-"),
                f"{run['seconds']:.1f}",
                f"{plain['later_seconds'] / run['later_seconds']:.2f}",
                f"{run['step_seconds_dense']:.3f}",
                f"{plain['step_seconds_dense'] / run['step_seconds_dense']:.2f}",
                f"{run['step_seconds_end']:.3f}",
                f"{plain['step_seconds_end'] / run['step_seconds_end']:.2f}",
                "-" if run["peak_bytes"] is None else f"{run['peak_bytes'] / GIGABYTE:.1f}",
                str(run.get("same", "-")).lower(),
            ]
        )
    header = ("model", "GPUs", "slices", "seconds", "times faster", "dense step s", "times", "last steps s", "times")
    return table((*header, "peak GB", "same run"), lines) if lines else ""
