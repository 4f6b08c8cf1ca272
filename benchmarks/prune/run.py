"""A whole pruning run on a synthetic model of real shape, beside one step of the paper's way.

The model is random and never leaves the device; `gisp.prune` runs preset fast on random tokens. Every model gets a
process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.command import (
    Budget,
    Parser,
    add_result_options,
    check_plot,
    count,
    models_and_device,
    positive,
    read_json,
    reading,
    result_of,
    table,
    write_json,
)
from benchmarks.common.compare import regressed
from benchmarks.common.goals import goal_table
from benchmarks.common.identity import ROOT, identity
from benchmarks.common.measure import ceilings
from benchmarks.common.registry import MODELS
from benchmarks.common.synthetic import build_model, random_tokens
from benchmarks.prune.compensation import timed_compensation
from benchmarks.prune.goals import GIGABYTE, prune_goals, prune_ratios
from benchmarks.prune.gpu_time import pass_gpu_time
from benchmarks.prune.host import show_host
from benchmarks.prune.measure import Setting, timed_run
from benchmarks.prune.offload import PLACES, measure_offload, show_offload
from benchmarks.prune.paper import time_paper_step
from benchmarks.prune.replicas import all_same, check_shared, counts_of, measure_replicas, run_replica, show_replicas
from benchmarks.prune.stages import measure_stages, run_stage, show_stages
from gisp.compensation import CompensationOptions
from gisp.compensation.options import METHODS
from gisp.compensation.request import make_request
from gisp.config.options import SLICES
from gisp.errors import GispError
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.replicas.environment import launched

NAME = "gisp bench prune"
_SEQUENCES = 2000


def measure_model(
    name: str,
    device: torch.device,
    setting: Setting,
    budget: Budget,
    *,
    paper: bool,
    compensation: CompensationOptions | None = None,
) -> dict[str, Any]:
    """Everything measured on one model, JSON-ready.

    Args:
        paper: also time a step of the paper's way, before anything is removed.
        compensation: also compensate what a whole run left.
    """
    shape = MODELS[name]
    on_gpu = device.type == "cuda"
    peak = ceilings() if on_gpu else None
    if on_gpu:
        torch.cuda.empty_cache()
    model = build_model(shape, device, torch.bfloat16 if on_gpu else torch.float32)
    tokens = random_tokens(shape, _SEQUENCES if on_gpu else 64, setting.length)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    baseline = time_paper_step(model, tokens) if paper else None
    if on_gpu:
        torch.cuda.empty_cache()
    result = timed_run(shape, model, tokens, setting, peak, budget)
    compensated = None
    if compensation and result["stopped_by_budget"]:
        print("the budget is spent before the run ended: nothing is compensated", flush=True)
    elif compensation:
        compensated = timed_compensation(model, tokens, compensation)
    gpu_time = None
    if on_gpu and not setting.fp8:
        pruned = ShrinkableModel.of(model)
        gpu_time = {"end": pass_gpu_time(pruned.map, tokens, setting)} if pruned else {}
        del pruned
        del model
        torch.cuda.empty_cache()
        dense = pass_gpu_time(map_model(build_model(shape, device, torch.bfloat16)), tokens, setting)
        gpu_time = {"dense": dense, **gpu_time}
    return {
        "model": name,
        "device": device.type,
        "ceilings": asdict(peak) if peak else None,
        **result,
        "pass_gpu_time": gpu_time,
        "paper": baseline,
        "compensation": compensated,
    }


def measure_apart(names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """The same for several models, each in a fresh process."""
    runs, found = [], None
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            out = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", "benchmarks.prune", "--model", name, "--out", str(out), *_forward(args)]
            code = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode
            if code or not out.exists():
                runs.append({"model": name, "error": f"its process ended with exit code {code}"})
                continue
            result = read_json(out, "prune")
            found = found or result["identity"]
            runs += result["runs"]
    return {"benchmark": "prune", "identity": found or identity(torch.device("cpu")), "runs": runs}


def _forward(args: argparse.Namespace) -> list[str]:
    given = ["--device", args.device, "--sparsity", str(args.sparsity), "--quiet"]
    options = ("steps", "batch_tokens", "budget", "criterion", "compensate", "compensation_steps", "calibration_tokens")
    for option in options:
        value = getattr(args, option)
        if value is not None:
            given += [f"--{option.replace('_', '-')}", str(value)]
    return given + ([] if args.paper else ["--no-paper"]) + (["--fp8"] if args.fp8 else [])


def show(runs: list[dict[str, Any]]) -> str:
    """The table of a result."""
    lines = []
    for run in runs:
        if "error" in run:
            lines.append([run["model"], run["error"], *[""] * 7])
            continue
        paper = run["paper"]
        lines.append(
            [
                f"{run['model']}, {run.get('criterion', 'gisp')}",
                f"{run['steps']} to {100 * run['sparsity']:.1f} %",
                f"{run['seconds']:.1f}",
                f"{run['setup_seconds']:.1f} + {run['first_step_seconds']:.1f}",
                f"{run['tokens_per_second_dense']:,.0f} / {run['tokens_per_second_end']:,.0f}",
                _percent(run, "dense") + " / " + _percent(run, "end"),
                "-" if run["peak_bytes"] is None else f"{run['peak_bytes'] / GIGABYTE:.1f}",
                "-" if paper is None else f"{paper['tokens_per_second']:,.0f}",
                "-" if paper is None else f"{paper['hours']:.1f}",
            ]
        )
    header = ("model", "steps", "seconds", "setup + step 1", "tokens/s dense / end", "% of matmul dense / end")
    return table((*header, "peak GB", "paper's way tokens/s", "its 280 steps, h"), lines)


def show_steps(runs: list[dict[str, Any]]) -> str:
    """Milliseconds of a step beside those the GPU works on its importance pass; empty without runs that hold them."""
    lines = []
    for run in runs:
        for where, work in (run.get("pass_gpu_time") or {}).items():
            step, own = 1000 * run[f"step_{where}"]["step"], 1000 * work["seconds"]
            lines.append([f"{run['model']}, {where}", f"{step:.1f}", f"{own:.1f}", f"{work['kernels']:,}"])
    return table(("step", "ms", "the GPU's own of the pass, ms", "its kernels"), lines) if lines else ""


def show_phases(runs: list[dict[str, Any]]) -> str:
    """Seconds of every phase, summed over the steps."""
    lines = [
        [run["model"], phase, f"{seconds:.2f}", f"{100 * seconds / max(run['seconds'], 1e-9):.1f}"]
        for run in runs
        if "error" not in run
        for phase, seconds in run["phases"].items()
    ]
    return table(("model", "phase", "seconds", "% of the run"), lines)


def show_compensation(runs: list[dict[str, Any]]) -> str:
    """What compensating the pruned models took; empty where none was."""
    lines = []
    for run in runs:
        found = run.get("compensation")
        if found is None:
            continue
        steps = found["steps"]
        lines.append(
            [
                f"{run['model']}, {found['method']}",
                f"{found['seconds']:.1f}",
                f"{found['fit_seconds']:.1f}",
                f"{found['fit_tokens']:,}" + "".join(f" + {step['tokens']:,}" for step in steps),
                "-" if found["squares_left"] is None else f"{100 * found['squares_left']:.1f}",
                f"{steps[0]['before']:.4g} to {steps[-1]['after']:.4g}" if steps else "-",
                "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / GIGABYTE:.1f}",
            ]
        )
    header = ("compensation", "seconds", "of that the fit", "tokens", "% of squares left", "nats a token", "peak GB")
    return table(header, lines) if lines else ""


def _percent(run: dict[str, Any], where: str) -> str:
    value = run[f"percent_of_matmul_{where}"]
    return "-" if value is None else f"{value:.1f}"


def parser() -> argparse.ArgumentParser:
    options = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(MODELS)
    options.add_argument("--model", action="append", metavar="NAME", help=f"{known}; repeatable (the real ones)")
    options.add_argument("--device", default="auto", help="auto, cpu or cuda; a CPU takes tiny alone")
    options.add_argument("--sparsity", type=float, default=0.5, help="of the decoder parameters (0.5)")
    options.add_argument("--steps", type=count, help="pruning steps (200)")
    options.add_argument("--batch-tokens", type=count, help="tokens per step (8192)")
    options.add_argument("--budget", type=positive, metavar="SECONDS", help="stop a model's run after that")
    options.add_argument("--fp8", action="store_true", help="8-bit products in the importance pass")
    options.add_argument("--criterion", choices=("second-order", "gisp"), help="of the scores (that of preset fast)")
    options.add_argument("--no-paper", dest="paper", action="store_false", help="leave the paper's way out")
    options.add_argument("--compensate", choices=METHODS, help="also compensate what the run left")
    options.add_argument("--compensation-steps", type=count, help="of kfac (4), gates (150) or distil (300)")
    options.add_argument("--calibration-tokens", type=count, help="of a fit and of a step of kfac (131072)")
    options.add_argument("--gpus", type=counts_of, metavar="1,2,4", help="only time runs shared by so many GPUs")
    options.add_argument("--slices", type=count, help=f"with --gpus: parts of a step summed by themselves ({SLICES})")
    options.add_argument(
        "--offload", action="store_true", help="only time runs with layers in host memory beside plain"
    )
    options.add_argument("--gpu-memory", metavar="SIZE", help="with --offload: memory to take, as 24GB (what is free)")
    options.add_argument("--layers", type=count, help="with --offload: cut the model to so many layers")
    options.add_argument("--stages", type=count, help="only time a run of a model split into so many (with --gpus)")
    add_result_options(options, plots=True)
    options.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if a model's run failed, runs that must be the same are not, or a ratio is worse than before.

    Raises:
        GispError: bad options, or no GPU for a real model.
    """
    args = parser().parse_args(argv)
    if launched():
        return run_stage(args) if args.stages else run_replica(args)
    check_plot(args)
    result = result_of(args, "prune", lambda: _measure(args), prune_ratios)
    with reading(args.source):
        return _shown(args, result)


def _shown(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """Print and draw a result; the exit code."""
    runs = result.get("runs", [])
    if not args.quiet:
        print(f"{show(runs)}\n{show_phases(runs)}\n" if runs else "", end="")
        beside_gpu = show_steps(runs)
        print(beside_gpu + "\n" if beside_gpu else "", end="")
        places = [(run["model"], run[place], place) for run in result.get("offload", []) for place in PLACES]
        beside = [{**found, "model": f"{name}, {place}"} for name, found, place in places if found]
        timed = show_host([*runs, *beside, *result.get("stages", [])])
        print(timed + "\n" if timed else "", end="")
        compensated = show_compensation(runs)
        print(compensated + "\n" if compensated else "", end="")
        offloaded = show_offload(result.get("offload", []))
        print(offloaded + "\n" if offloaded else "", end="")
        shared = show_replicas(result.get("replicas", []))
        print(shared + "\n" if shared else "", end="")
        split = show_stages(result.get("stages", []))
        print(split + "\n" if split else "", end="")
    if args.goals:
        print(goal_table(prune_goals(runs)))
    if args.plot:
        from benchmarks.prune.plots import write_plots

        for path in write_plots(result, args.out or args.source):
            print(f"wrote {path}")
    failed = any("error" in run for run in [*runs, *result.get("offload", [])])
    slower = regressed(args, result, prune_ratios)
    return 0 if all_same(result) and not failed and not slower else 1


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    _check_together(args)
    names, device = models_and_device(args, NAME)
    if args.stages:
        args.gpus = args.gpus or [args.stages]
        check_shared(args)
        return measure_stages(names, args)
    if args.gpus:
        check_shared(args)
        return measure_replicas(names, args, lambda result: write_json(args.out, result) if args.out else None)
    setting = Setting.make(device, args.sparsity, args.steps, args.batch_tokens, args.fp8, args.criterion)
    if args.offload:
        found = [measure_offload(name, device, setting, args) for name in names]
        return {"benchmark": "prune", "identity": identity(device), "runs": [], "offload": found}
    compensation = _compensation(args)
    if len(names) > 1:
        return measure_apart(names, args)
    run = measure_model(names[0], device, setting, Budget(args.budget), paper=args.paper, compensation=compensation)
    return {"benchmark": "prune", "identity": identity(device), "runs": [run]}


def _check_together(args: argparse.Namespace) -> None:
    """Refuse options of another kind of run.

    Raises:
        GispError: names them.
    """
    if args.offload and (args.stages or args.gpus):
        other = "--stages" if args.stages else "--gpus"
        raise GispError(f"--offload is for one GPU, {other} for several: leave one of them out")
    for option in ("gpu_memory", "layers"):
        if getattr(args, option) is not None and not args.offload:
            raise GispError(f"--{option.replace('_', '-')} changes nothing without --offload: leave it out or add that")
    if args.slices and (args.stages or not args.gpus):
        raise GispError("--slices is for runs shared by --gpus alone: leave it out")


def _compensation(args: argparse.Namespace) -> CompensationOptions | None:
    """Checked as the options of ``gisp export`` are; the calibration data are those of the run."""
    data = args.compensate and "random tokens"
    request = make_request(args.compensate, data, tokens=args.calibration_tokens, steps=args.compensation_steps)
    return request.options if request else None
