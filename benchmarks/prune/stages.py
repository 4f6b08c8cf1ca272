"""A run of a model that is split by whole layers over GPUs, with random weights made where they lie.

Beside time and speed it tells the share of the sum of all cards' measured matrix products, the share of the step that
the schedule leaves stages idle, and the share that they were seen to wait for one another.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.command import Budget, table, write_json
from benchmarks.common.identity import ROOT, identity
from benchmarks.common.measure import Ceilings, ceilings
from benchmarks.common.registry import MODELS, Model
from benchmarks.common.synthetic import llama_settings, random_tokens
from benchmarks.prune.goals import GIGABYTE
from benchmarks.prune.measure import LENGTH, Setting, timed_run
from gisp.config.options import STAGE_SLICES, make_config
from gisp.errors import GispError
from gisp.model.structures import map_model, protected_layers
from gisp.replicas.agreement import agree
from gisp.replicas.environment import joined
from gisp.replicas.group import Replicas
from gisp.replicas.launch import launch
from gisp.stages.costs import layer_costs
from gisp.stages.group import Stages
from gisp.stages.load import put, with_tables
from gisp.stages.placement import Placement, schedule_of
from gisp.stages.rules import Sharing, check_sharing
from gisp.stages.stage_model import held_names, placement_of

_SEQUENCES = 2000


def measure_stages(names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """A run of every model in fresh processes; the result, JSON-ready.

    Raises:
        GispError: the GPUs do not make whole rows, or a run failed.
    """
    count = args.gpus[0]
    if len(args.gpus) > 1:
        raise GispError(f"--gpus is {','.join(map(str, args.gpus))}: runs in stages take one number")
    for name in names:
        check_sharing(Sharing(count, args.stages, MODELS[name].layers, slices=STAGE_SLICES))
    paths = (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    result: dict[str, Any] = {"benchmark": "prune", "identity": None, "runs": [], "stages": []}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run.json"
            given = ["--model", name, "--device", args.device, "--sparsity", str(args.sparsity), "--out", str(out)]
            given += [f"--stages={args.stages}"] + [f"--steps={args.steps}"] * bool(args.steps)
            given += [f"--batch-tokens={args.batch_tokens}"] * bool(args.batch_tokens) + ["--fp8"] * args.fp8
            code = launch(count, "benchmarks.prune", given, again="start it again")
            if code:
                raise GispError(f"the run of {name} in {args.stages} stages ended with exit code {code}")
            found = json.loads(out.read_text())
        result["identity"] = found.pop("identity")
        result["stages"].append({"model": name, "gpus": count, "stages": args.stages, **found})
    return result


def run_stage(args: argparse.Namespace) -> int:
    """One process of such a run; the first one writes what it took to ``--out``."""
    (name,) = args.model
    shape = MODELS[name]
    with joined(args.device) as group:
        on_gpu = args.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        setting = Setting.make(device, args.sparsity, args.steps, args.batch_tokens, args.fp8)
        replicas = Replicas(group)
        stage = replicas.rank % args.stages
        peak = _ceilings(replicas) if on_gpu else None
        start = time.perf_counter()
        model, placement = build_part(shape, args.stages, stage, device)
        built = time.perf_counter() - start
        tokens = random_tokens(shape, _SEQUENCES if on_gpu else 64, LENGTH)
        idle = _scheduled_idle(model, placement, setting)
        with waiting(device) as waited:
            found = timed_run(shape, model, tokens, setting, peak, Budget(None), group, stages=args.stages)
        here = {
            "card": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "seconds": waited(),
            "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
            "reserved_bytes": torch.cuda.memory_reserved(device) if on_gpu else None,
            "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta),
        }
        agree(replicas, {"trajectory": found["trajectory_sha256"]})
        ranks = [json.loads(data) for data in replicas.exchange(json.dumps(here).encode())]
    if replicas.first:
        found["built_seconds"] = built
        found["matmul_tflops_sum"] = peak.matmul_tflops if peak else None
        found["chunks"] = placement.bounds
        found["scheduled_idle_share"] = idle
        found["waiting_share"] = sum(rank["seconds"] for rank in ranks) / (len(ranks) * found["seconds"])
        found["ranks"] = ranks
        write_json(Path(args.out), {"identity": identity(device), **found})
    return 0


def build_part(shape: Model, stages: int, stage: int, device: torch.device) -> tuple[Any, Placement]:
    """A Llama model of which the layers of one stage have random weights on ``device``, all others none.

    A parameter's values follow from its name: models in any number of stages are the same.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(LlamaConfig(**llama_settings(shape), use_cache=False)).eval()
    finally:
        torch.set_default_dtype(before)
    with_tables(model).model.rotary_emb.to(device)
    placement = placement_of(model, make_config(slices=STAGE_SLICES), stages)
    names = held_names(model, placement, stage)
    for name, parameter in [*model.named_parameters()]:
        if name not in names:
            continue
        tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        put(model, parameter, tensor.fill_(1) if "norm" in name else tensor.normal_(0, 0.02, generator=generator))
    return model, placement


@contextmanager
def waiting(device: torch.device) -> Iterator[Callable[[], float]]:
    """Inside, what stages wait for one another is timed; gives a function that tells the seconds of this one."""
    marks: list[tuple[Any, Any]] = []

    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(function: Callable[..., Any], *args: Any) -> Any:
        start = mark()
        result = function(*args)
        marks.append((start, mark()))
        return result

    def seconds() -> float:
        if device.type != "cuda":
            return float(sum(stop - start for start, stop in marks))
        torch.cuda.synchronize(device)
        return sum(start.elapsed_time(stop) for start, stop in marks) / 1000

    wait, gather = Stages.wait, Replicas.gather
    # Functions, so that they bind to their instances as the methods do.
    Stages.wait = lambda self, work: timed(partial(wait, self), work)  # type: ignore[method-assign]
    Replicas.gather = lambda self, rows, most: timed(partial(gather, self), rows, most)  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Stages.wait, Replicas.gather = wait, gather  # type: ignore[method-assign]


def _ceilings(replicas: Replicas) -> Ceilings:
    """Of all cards together, measured at one time as they then run."""
    own = ceilings()
    torch.cuda.empty_cache()
    found = [json.loads(data) for data in replicas.exchange(json.dumps(own.matmul_tflops).encode())]
    return replace(own, matmul_tflops=sum(found))


def _scheduled_idle(model: Any, placement: Placement, setting: Setting) -> float:
    config = make_config(slices=STAGE_SLICES)
    layers = len(placement.owners())
    protected = protected_layers(layers, config.protect_first, config.protect_last)
    lowest = min(set(range(layers)) - protected)
    tokens = [setting.batch_tokens // STAGE_SLICES] * STAGE_SLICES
    return schedule_of(layer_costs(map_model(model, config.gqa), lowest), placement, tokens).idle


def show_stages(runs: list[dict[str, Any]]) -> str:
    """The table of a result; empty without runs."""
    lines = []
    for run in runs:
        percent = [run.get(f"percent_of_matmul_{where}") for where in ("dense", "end")]
        peaks = [rank["peak_bytes"] for rank in run["ranks"] if rank["peak_bytes"] is not None]
        lines.append(
            [
                f"{run['model']}, {run['stages']} stages on {run['gpus']}",
                f"{run['steps']} to {100 * run['sparsity']:.1f} %",
                f"{run['seconds']:.1f}",
                f"{run['tokens_per_second_dense']:,.0f} / {run['tokens_per_second_end']:,.0f}",
                " / ".join("-" if value is None else f"{value:.1f}" for value in percent),
                f"{100 * run['scheduled_idle_share']:.1f} / {100 * run['waiting_share']:.1f}",
                f"{max(peaks) / GIGABYTE:.1f}" if peaks else "-",
                run["trajectory_sha256"][:12],
            ]
        )
    header = ("split model", "steps", "seconds", "tokens/s dense / end", "% of all matmuls dense / end")
    return table((*header, "% idle scheduled / waited", "peak GB a card", "trajectory"), lines) if lines else ""
