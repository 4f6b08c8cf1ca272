"""What the three ways of pruning shared key/value heads leave: perplexity, stored parameters and cache.

    python -m benchmarks.studies.gqa_modes MODEL --calibration C --evaluation E --out R.json

One run of preset fast with GISP's scores per mode, equal but for --gqa. Stored is what an hf export holds: its
attention has equally many query heads per key/value head, so heads removed unevenly leave some of these stored twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.common.command import exit_code, table
from benchmarks.studies.study import Study, parser
from gisp.config.options import GQA_MODES
from gisp.errors import GispError
from gisp.export.sizes.layout import plan_attention
from gisp.model.structures import ModelMap, map_model
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


def stored(trajectory: Trajectory, model_map: ModelMap, step: int) -> dict[str, Any]:
    """What an hf export of a step holds, as shares of the dense model."""
    width, heads, kv_heads = model_map.hidden_size * model_map.head_dim, model_map.num_heads, model_map.num_kv_heads
    layers = len(model_map.layers)
    attention = kv = kept = channels = kept_heads = 0
    for query_heads, mlp_channels in trajectory.keep(step).layers:
        layout = plan_attention(query_heads, heads, kv_heads)
        attention += 2 * width * (len(layout.query) + len(layout.kv))
        kv += len(layout.kv)
        kept += len({head // model_map.heads_per_kv for head in query_heads})
        channels += max(1, len(mlp_channels))
        kept_heads += len(query_heads)
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
    study = Study(parser(NAME, __doc__).parse_args(argv))
    model_map = map_model(study.load())
    if not model_map.shares_kv:
        raise GispError(f"{study.path} has a key/value head per query head: the modes are all the same")
    rows: list[Row] = []
    for mode in GQA_MODES:
        trajectory = study.run(gqa=mode)
        for sparsity in study.sparsities:
            step = trajectory.step_for(sparsity)
            found = study.perplexity(trajectory, sparsity)
            rows.append(Row(mode, trajectory.sparsity_at(step), found, **stored(trajectory, model_map, step)))
        print(show([asdict(row) for row in rows[-len(study.sparsities) :]]), flush=True)
    study.report("gqa", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
