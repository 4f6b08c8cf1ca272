"""Sizes an export rounds to, and the pruned point rounded to them with real weights taken back from the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gisp.errors import GispError
from gisp.export.sizes.options import SizeOptions, option_text
from gisp.export.spec import PrunedSpec
from gisp.model.keep import kv_heads
from gisp.model.structures import ModelMap


def kept_parameters(model_map: ModelMap, heads: Sequence[int], channels: int) -> int:
    """Parameters of one layer that its kept query heads and channels need.

    A query head needs its rows of q and columns of o, a key/value head that a kept query head reads needs its rows of k
    and v, a channel its rows of gate and up and its column of down. Biases of rows go with them.
    """
    read = kv_heads(heads, model_map.heads_per_kv)
    of_heads = model_map.query_parameters * len(heads) + model_map.kv_parameters * len(read)
    return of_heads + model_map.channel_parameters * channels


def require_ranking(spec: PrunedSpec, what: str) -> None:
    """Refuse a spec that does not say in which order structures went.

    Raises:
        GispError: the spec has no ranking of its layers.
    """
    if len(spec.ranking) != len(spec.keep.heads):
        raise GispError(f"{what} needs a ranking of {len(spec.keep.heads)} layers, the spec has {len(spec.ranking)}")


def round_mlp(model_map: ModelMap, spec: PrunedSpec, multiple: int) -> PrunedSpec:
    """Every MLP width rounded up to a multiple by taking back the channels that went last (ties: lowest index).

    A width never exceeds the dense one, also where that is no multiple; an MLP without channels gets one multiple back.

    Raises:
        GispError: ``multiple`` below 1, or a spec without ranking.
    """
    options = SizeOptions(round_mlp=multiple).given()
    require_ranking(spec, option_text(options))
    layers = []
    for kept, ranking in zip(spec.keep.channels, spec.ranking, strict=True):
        width = -(-len(kept) // multiple) * multiple
        if multiple > 1:
            # An exported MLP has a channel in any case: a zeroed one alone would be no multiple.
            width = max(width, multiple)
        stays = set(kept)
        gone = [channel for channel in ranking.channels if channel not in stays]
        back = gone[: min(width, model_map.intermediate_size) - len(kept)]
        layers.append(tuple(sorted((*kept, *back))))
    count = sum(map(len, layers)) - sum(map(len, spec.keep.channels))
    more = count * model_map.channel_parameters
    note = (
        f"MLP widths rounded up to multiples of {multiple}",
        f"{count:,} channels of the dense model are back: {more:,} parameters more than the pruned point of sparsity "
        f"{spec.sparsity:.4f}",
    )
    return replace(
        spec,
        keep=replace(spec.keep, channels=tuple(layers)),
        sparsity=spec.sparsity - more / model_map.decoder_parameters,
        model_sparsity=spec.model_sparsity - more / model_map.parameters,
        options={**spec.options, **options},
        notes=(*spec.notes, note),
    )
