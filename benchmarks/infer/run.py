"""Inference of pruned models beside the dense one: prefill, first token, decoding, weights and cache.

The models are those an export loads (per-layer widths, the modeling file of exports) with random weights of real shape,
made on the device, or with --run the sizes of a run. Decoding replays a CUDA graph over a static cache, as serving
engines do; --no-graph shows what plain generate pays in launches. The pass over the prompt is timed eager and as a
graph. Norms and activations run fused (gisp.fuse), also as serving engines do; --plain leaves them as transformers runs
them. All sizes of a model are measured in one process.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
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
from benchmarks.common.measure import ceilings
from benchmarks.common.registry import MODELS, Model
from benchmarks.infer.goals import infer_goals, infer_ratios
from benchmarks.infer.measure import Setting, measure_inference
from benchmarks.infer.shapes import LayerShape, build_pruned, decoder_parameters, pruned_layers
from gisp.errors import GispError
from gisp.model.load import resolve_device

NAME = "gisp bench infer"
SPARSITIES = "0.2,0.3,0.4,0.5"


def measure_model(
    name: str, model: Model, sizes: dict[float, list[LayerShape]], setting: Setting, device: torch.device
) -> dict[str, Any]:
    """Dense and every size of one model, JSON-ready.

    Args:
        sizes: sizes of the layers by sparsity asked for; 0 is dense.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dense = decoder_parameters(model, sizes[0.0])
    rows = []
    for sparsity, layers in sizes.items():
        built = build_pruned(model, layers, device, dtype)
        removed = 1 - decoder_parameters(model, layers) / dense
        row = {"asked": sparsity, "sparsity": removed, "layers": [asdict(item) for item in layers]}
        rows.append({**row, **measure_inference(built, setting)})
        print(
            f"{name} at {removed:.3f}: prefill {rows[-1]['prefill_ms']:.2f} ms, decode {rows[-1]['decode_ms']}",
            flush=True,
        )
        del built
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"model": name, "dtype": str(dtype), **asdict(setting), "rows": rows}


def show(models: list[dict[str, Any]]) -> str:
    """The table of a result; in brackets how many times the dense model's speed, or its share of bytes."""
    lines = []
    for item in models:
        dense = item["rows"][0]
        batches = list(dense["decode_ms"])
        for row in item["rows"]:
            decode = [_speed(dense["decode_ms"][batch], row["decode_ms"][batch]) for batch in batches]
            lines.append(
                [
                    item["model"],
                    f"{100 * row['sparsity']:.1f}",
                    _speed(dense["prefill_ms"], row["prefill_ms"]),
                    _captured(dense, row),
                    _speed(dense["first_token_ms"], row["first_token_ms"]),
                    " ".join(decode),
                    f"{row['weight_bytes'] / 1e9:.2f} ({row['weight_bytes'] / dense['weight_bytes']:.2f})",
                    f"{row['kv_bytes_per_token'] / 1024:.0f}",
                ]
            )
    sizes = ", ".join(models[0]["rows"][0]["decode_ms"]) if models else ""
    header = (
        "model",
        "sparsity %",
        "prefill ms",
        "captured",
        "first token ms",
        f"decode ms, batch {sizes}",
        "weights GB",
        "KV KiB/token",
    )
    return table(header, lines)


def _captured(dense: dict[str, Any], row: dict[str, Any]) -> str:
    """The captured prefill; a result without a graph has none, nor one written before there was any."""
    one, other = (item.get("captured_prefill_ms") for item in (dense, row))
    return _speed(one, other) if one and other else "-"


def _speed(dense: float, here: float) -> str:
    return f"{here:.2f} ({dense / here:.2f}x)"


def run_sizes(run: Path, sparsities: list[float]) -> tuple[str, Model, dict[float, list[LayerShape]]]:
    """Name, dense shape and layer sizes of a run's exports.

    Raises:
        GispError: no run there.
    """
    from gisp.export.sizes.layout import plan_attention
    from gisp.run.trajectory import Trajectory

    trajectory = Trajectory.load(run)
    base = trajectory.base_model
    heads, kv_heads = int(base["num_attention_heads"]), int(base["num_key_value_heads"])
    model = Model(
        layers=int(base["layers"]),
        hidden=int(base["hidden_size"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(base["head_dim"]),
        channels=int(base["intermediate_size"]),
        # Embeddings and the output projection of a run's base model are what is not in its decoder layers.
        vocabulary=max(
            2, (int(base["parameters"]) - int(base["decoder_parameters"])) // (2 * int(base["hidden_size"]))
        ),
    )
    sizes = {}
    for sparsity in (0.0, *sparsities):
        keep = trajectory.keep(trajectory.step_for(sparsity))
        layouts = [plan_attention(kept, heads, kv_heads) for kept in keep.heads]
        sizes[sparsity] = [
            LayerShape(len(layout.query), len(layout.kv), max(1, len(channels)))
            for channels, layout in zip(keep.channels, layouts, strict=True)
        ]
    return run.name, model, sizes


def parser() -> argparse.ArgumentParser:
    options = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(MODELS)
    options.add_argument("--model", action="append", metavar="NAME", help=f"{known}; repeatable (the real ones)")
    options.add_argument("--run", type=Path, help="instead, the sizes of a run folder")
    options.add_argument("--sparsities", default=SPARSITIES, help=f"beside dense ({SPARSITIES})")
    options.add_argument("--prompt", type=count, default=2048, help="tokens of the prompt (2048)")
    options.add_argument("--context", type=count, default=512, help="tokens in the cache when decoding (512)")
    options.add_argument("--batches", default="1,32", help="batch sizes of decoding (1,32)")
    options.add_argument("--repetitions", type=count, default=10, help="of everything (10)")
    options.add_argument("--no-graph", dest="graph", action="store_false", help="launch decoding kernel by kernel")
    options.add_argument(
        "--plain", dest="fused", action="store_false", help="norms and activations as plain transformers runs them"
    )
    options.add_argument("--device", default="auto", help="auto, cpu or cuda; a CPU takes tiny or a small run alone")
    add_result_options(options, plots=False)
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if a ratio is worse than before.

    Raises:
        GispError: bad options, or no GPU for a real model.
    """
    args = parser().parse_args(argv)
    result = result_of(args, "infer", lambda: _measure(args), infer_ratios)
    with reading(args.source):
        print(show(result["models"]))
        if args.goals:
            print(goal_table(infer_goals(result["models"])))
    return 1 if regressed(args, result, infer_ratios) else 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    sparsities = numbers("--sparsities", args.sparsities, float)
    if not all(0 < sparsity < 1 for sparsity in sparsities):
        raise GispError(f"--sparsities is {args.sparsities!r}: give numbers between 0 and 1")
    batches = tuple(numbers("--batches", args.batches, int))
    if not all(batch > 0 for batch in batches):
        raise GispError(f"--batches is {args.batches!r}: give numbers above 0")
    setting = Setting(args.prompt, args.context, batches, args.repetitions, args.graph, args.fused)
    if args.run:
        device, todo = resolve_device(args.device), [run_sizes(args.run, sparsities)]
    else:
        names, device = models_and_device(args, NAME)
        todo = [
            (name, MODELS[name], {value: pruned_layers(MODELS[name], value) for value in (0.0, *sparsities)})
            for name in names
        ]
    peak = ceilings() if device.type == "cuda" else None
    found = [measure_model(name, model, sizes, setting, device) for name, model, sizes in todo]
    return {
        "benchmark": "infer",
        "identity": identity(device),
        "ceilings": asdict(peak) if peak else None,
        "models": found,
    }
