"""What the three ways of pruning shared key/value heads leave: perplexity, stored parameters and cache.

    python -m benchmarks.studies.gqa_modes MODEL --calibration C --evaluation E --out R.json

One run of preset fast with GISP's scores per mode, equal but for --gqa. Stored is what an hf export holds: its
attention has equally many query heads per key/value head, so heads removed unevenly leave some of these stored twice.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.command import Parser, check_writable, count, exit_code, table, write_json
from benchmarks.common.identity import identity
from gisp.config.options import GQA_MODES
from gisp.data import load_sequences
from gisp.errors import GispError
from gisp.evaluate import perplexity
from gisp.export.point import pruned_spec
from gisp.export.relayout import plan_attention
from gisp.model.load import check_model_path, load_dense, resolve_device, resolve_dtype
from gisp.model.structures import ModelMap, map_model
from gisp.run.loop import prune
from gisp.run.trajectory import Trajectory

NAME = "python -m benchmarks.studies.gqa_modes"


@dataclass(frozen=True)
class Row:
    """One mode at one sparsity.

    Attributes:
        sparsity: of the decoder parameters, as the run counts it.
        decoder_stored: parameters of the exported decoder layers over those of the dense ones.
        attention_stored: the same of attention's projections alone.
        kv_stored: key/value cache of the export over the dense one.
        kv_kept: key/value heads that some kept query head reads, over all: what an indexed cache holds.
        heads: query heads kept, of all layers.
    """

    mode: str
    sparsity: float
    perplexity: float
    decoder_stored: float
    attention_stored: float
    kv_stored: float
    kv_kept: float
    heads: int


def stored(trajectory: Trajectory, model_map: ModelMap, step: int) -> dict[str, float]:
    """What an hf export of a step holds, as shares of the dense model."""
    width, heads, kv_heads = model_map.hidden_size * model_map.head_dim, model_map.num_heads, model_map.num_kv_heads
    layers = len(model_map.layers)
    attention = kv = kept = channels = kept_heads = 0
    for keep in pruned_spec(trajectory, step).layers:
        layout = plan_attention(keep.heads, heads, kv_heads)
        attention += 2 * width * (len(layout.query) + len(layout.kv))
        kv += len(layout.kv)
        kept += len({head // model_map.heads_per_kv for head in keep.heads})
        channels += max(1, len(keep.channels))
        kept_heads += len(keep.heads)
    dense_attention = 2 * width * (heads + kv_heads) * layers
    dense_mlp = 3 * model_map.hidden_size * model_map.intermediate_size * layers
    norms = model_map.decoder_parameters - dense_attention - dense_mlp
    decoder = attention + 3 * model_map.hidden_size * channels + norms
    return {
        "decoder_stored": decoder / model_map.decoder_parameters,
        "attention_stored": attention / dense_attention,
        "kv_stored": kv / (kv_heads * layers),
        "kv_kept": kept / (kv_heads * layers),
        "heads": kept_heads,
    }


def show(rows: list[dict[str, Any]]) -> str:
    """The table of a result; stored columns in percent of dense."""
    lines = [
        [
            row["mode"],
            f"{100 * row['sparsity']:.1f}",
            f"{row['perplexity']:.2f}",
            *(f"{100 * row[key]:.1f}" for key in ("decoder_stored", "attention_stored", "kv_stored", "kv_kept")),
            str(row["heads"]),
        ]
        for row in rows
    ]
    header = ("mode", "sparsity %", "perplexity", "decoder stored %", "attention stored %", "KV stored %", "KV kept %")
    return table((*header, "query heads"), lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        GispError: bad options, or a model without shared key/value heads.
    """
    options = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("--calibration", required=True)
    options.add_argument("--evaluation", required=True)
    options.add_argument("--out", type=Path)
    options.add_argument("--sparsities", default="0.2,0.3,0.4,0.5")
    options.add_argument("--steps", type=count, default=200)
    options.add_argument("--batch-tokens", type=count, default=8192)
    options.add_argument("--window", type=count, default=256)
    options.add_argument("--device", default="auto")
    options.add_argument("--dtype")
    args = options.parse_args(argv)
    check_writable(args.out)
    check_model_path(args.model)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    sparsities = [float(value) for value in args.sparsities.split(",")]
    vocab_size = map_model(load_dense(args.model, device, dtype)).vocab_size
    calibration, evaluation = (
        load_sequences(spec, vocab_size=vocab_size, seq_len=None, tokenizer_from=args.model)
        for spec in (args.calibration, args.evaluation)
    )
    rows: list[Row] = []
    for mode in GQA_MODES:
        model = load_dense(args.model, device, dtype)
        model_map = map_model(model)
        if not model_map.shares_kv:
            raise GispError(f"{args.model} has a key/value head per query head: the modes are all the same")
        run = {"steps": args.steps, "batch_tokens": args.batch_tokens, "gqa": mode, "criterion": "gisp"}
        trajectory = prune(model, calibration, sparsity=max(sparsities), **run)
        for sparsity in sparsities:
            step = trajectory.step_for(sparsity)
            found = perplexity(trajectory.at(sparsity), evaluation, args.window).perplexity
            rows.append(Row(mode, trajectory.sparsity_at(step), found, **stored(trajectory, model_map, step)))
        print(show([asdict(row) for row in rows[-len(sparsities) :]]), flush=True)
    if args.out:
        setting = {"model": Path(args.model).name, "dtype": str(dtype), "steps": args.steps}
        setting |= {"batch_tokens": args.batch_tokens, "window": args.window}
        result = {"benchmark": "gqa", "identity": identity(device), **setting, "rows": [asdict(row) for row in rows]}
        write_json(args.out, result)
        print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
