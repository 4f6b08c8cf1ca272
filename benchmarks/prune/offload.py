"""The same run with decoder layers in host memory, beside the run with all of them on the GPU where that fits."""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.common.command import Budget, table
from benchmarks.common.registry import MODELS, Model
from benchmarks.common.synthetic import build_filled, build_outline, fill_weight, random_tokens
from benchmarks.prune.measure import WINDOW, Setting, timed_run
from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.offload.place import place
from gisp.offload.stream import LayerStream
from gisp.offload.traffic import Traffic
from gisp.run.resources.placement import plan_of

_SEQUENCES = 2000
# Where the layers of the two runs of a result lie.
PLACES = ("resident", "offloaded")


def measure_offload(name: str, device: torch.device, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Both runs on the same random weights, JSON-ready."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shape = MODELS[name]
    shape = replace(shape, layers=args.layers or shape.layers)
    tokens = random_tokens(shape, _SEQUENCES if on_gpu else 64, setting.length)
    budget = partial(Budget, args.budget)
    resident = None
    if _fits(shape, setting, dtype, device):
        print(f"{name}: {shape.layers} layers on {device}", flush=True)
        model = build_filled(shape, device, dtype)
        resident = _figures(timed_run(shape, model, tokens, setting, None, budget()))
        del model
        _collect(on_gpu)
    outline = build_outline(shape, dtype)
    auto = args.gpu_memory is not None or resident is None
    places = {"offload": "auto" if auto else "always", "gpu_memory": args.gpu_memory, "device": device.type}
    config = make_config(sparsity=setting.sparsity, steps=setting.steps, batch_tokens=setting.batch_tokens, **places)
    plan = plan_of(outline, Sequences.plain([(row, row) for row in tokens]), config)
    if plan is None:
        return {"model": name, "layers": shape.layers, "resident": resident, "offloaded": None}
    print("\n".join(plan.lines()), flush=True)
    fill = partial(fill_weight, device)
    inputs, ends = plan.inputs_on_host, plan.ends_on_host
    stream = place(outline, plan.streamed, device, inputs_on_host=inputs, ends_on_host=ends, fill=fill)
    placed = {"model": name, "layers": shape.layers, "gpu_memory": args.gpu_memory, "resident": resident}
    first: list[Traffic] = []
    note_first = partial(_note, stream, first)
    try:
        found = _figures(timed_run(shape, outline, tokens, setting, None, budget(), after_first=note_first, **places))
    except torch.OutOfMemoryError as error:
        # What the plain run took is not lost.
        return {**placed, "offloaded": None, "error": str(error).splitlines()[0]}
    # The first step also compares the pass with the model on one sequence: nothing hides copies for that.
    traffic = stream.traffic.since(*first) if found["steps"] > 1 else stream.traffic
    return {
        **placed,
        "streamed_layers": len(plan.streamed),
        "inputs_on_host": inputs,
        "ends_on_host": ends,
        "planned_bytes": plan.device,
        "planned_host_bytes": plan.host,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "offloaded": found,
        "ratio": None if resident is None else found["step_seconds"] / resident["step_seconds"],
        "same_run": None if resident is None else found["trajectory_sha256"] == resident["trajectory_sha256"],
        "bytes": traffic.bytes,
        "gigabytes_per_second": traffic.bytes / traffic.seconds / 1e9 if traffic.seconds else None,
        "transfer_seconds": traffic.seconds,
        "exposed_seconds": traffic.exposed,
        "overlap": traffic.overlap,
    }


def _note(stream: LayerStream, noted: list[Traffic]) -> None:
    noted.append(stream.traffic)


def show_offload(runs: list[dict[str, Any]]) -> str:
    """The table of such runs."""
    lines = []
    for run in runs:
        found, resident = run["offloaded"], run["resident"]
        if found is None:
            said = run.get("error", "it fits, nothing was moved")
            lines.append([run["model"], str(run["layers"]), said, *[""] * 9])
            continue
        lines.append(
            [
                run["model"],
                f"{run['streamed_layers']} of {run['layers']}",
                "-" if resident is None else f"{resident['step_seconds']:.1f}",
                f"{found['step_seconds']:.1f}",
                "-" if run["ratio"] is None else f"{run['ratio']:.2f}",
                f"{found['step_seconds_dense']:.3f} / {found['step_seconds_end']:.3f}",
                f"{found['phases']['compact']:.1f}",
                "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e9:.1f}",
                f"{run['host_peak_bytes'] / 1e9:.1f}",
                f"{run['gigabytes_per_second'] or 0:.1f}",
                f"{100 * run['overlap']:.1f}",
                "-" if run["same_run"] is None else str(run["same_run"]).lower(),
            ]
        )
    times = ("model", "in host memory", "plain s", "offload s", "ratio", "step s dense / end", "of it compact s")
    places = ("GPU peak GB", "host peak GB", "GB/s", "overlap %", "same run")
    return table((*times, *places), lines) if lines else ""


def _figures(run: dict[str, Any]) -> dict[str, Any]:
    """A run with the seconds of its steps; the first ones also compile kernels."""
    seconds = [row["step_seconds"] for row in run["step_rows"]]
    run["step_seconds"] = sum(seconds)
    run["step_seconds_dense"] = statistics.median(seconds[1 : 1 + WINDOW] or seconds)
    run["step_seconds_end"] = statistics.median(seconds[1:][-WINDOW:] or seconds)
    return run


def _fits(shape: Model, setting: Setting, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a plain run has room for its weights and for what every layer keeps of a token."""
    if device.type != "cuda":
        return True
    weights = sum(p.numel() for p in build_outline(shape, dtype).parameters()) * dtype.itemsize
    # A plain run keeps what it has memory for; every layer keeps its input at least, the busiest one much more.
    kept = (
        setting.batch_tokens * dtype.itemsize * (shape.layers * shape.hidden + 16 * shape.hidden + 4 * shape.channels)
    )
    return 1.1 * (weights + kept) + 2e9 < torch.cuda.mem_get_info(device)[0]


def _collect(on_gpu: bool) -> None:
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
