"""Sizes an export rounds to, and the pruned point rounded to them with real weights taken back from the dense model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gisp.errors import GispError
from gisp.export.spec import LayerKeep, PrunedSpec
from gisp.model.structures import ModelMap


@dataclass(frozen=True)
class SizeOptions:
    """Sizes asked for; ``None`` = not asked for.

    Attributes:
        round_mlp: MLP widths are multiples of it.
        align_heads: numbers of query heads are multiples of it (tensor parallelism).
        min_heads: fewest query heads of a layer.
    """

    round_mlp: int | None = None
    align_heads: int | None = None
    min_heads: int | None = None

    def given(self) -> dict[str, int]:
        """The options asked for, by name.

        Raises:
            GispError: a value below 1.
        """
        values = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in values.items():
            if value < 1:
                raise GispError(f"{option_text({name: value})}: give 1 or more")
        return values


def option_text(options: dict[str, int]) -> str:
    """Options as they are typed: ``--round-mlp 64 --align-heads 4``."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def kept_parameters(model_map: ModelMap, keep: LayerKeep) -> int:
    """Weight matrix parameters of one layer that its kept structures need.

    A query head needs its rows of q and columns of o, a key/value head that a kept query head reads needs its rows of k
    and v, a channel its rows of gate and up and its column of down.
    """
    kv_heads = {head // model_map.heads_per_kv for head in keep.heads}
    block = 2 * model_map.head_dim * model_map.hidden_size
    return block * (len(keep.heads) + len(kv_heads)) + model_map.channel_parameters * len(keep.channels)


def require_ranking(spec: PrunedSpec, what: str) -> None:
    """Refuse a spec that does not say in which order structures went.

    Raises:
        GispError: the spec has no ranking of its layers.
    """
    if len(spec.ranking) != len(spec.layers):
        raise GispError(f"{what} needs a ranking of {len(spec.layers)} layers, the spec has {len(spec.ranking)}")


def round_mlp(model_map: ModelMap, spec: PrunedSpec, multiple: int) -> PrunedSpec:
    """Every MLP width rounded up to a multiple by taking back the channels that went last (ties: lowest index).

    A width never exceeds the dense one, also where that is no multiple; an MLP without channels gets one multiple back.

    Raises:
        GispError: ``multiple`` below 1, or a spec without ranking.
    """
    options = SizeOptions(round_mlp=multiple).given()
    require_ranking(spec, option_text(options))
    layers = []
    for keep, ranking in zip(spec.layers, spec.ranking, strict=True):
        width = -(-len(keep.channels) // multiple) * multiple
        if multiple > 1:
            # An exported MLP has a channel in any case: a zeroed one alone would be no multiple.
            width = max(width, multiple)
        kept = set(keep.channels)
        gone = [channel for channel in ranking.channels if channel not in kept]
        back = gone[: min(width, model_map.intermediate_size) - len(kept)]
        layers.append(replace(keep, channels=tuple(sorted((*keep.channels, *back)))))
    count = sum(len(new.channels) - len(old.channels) for new, old in zip(layers, spec.layers, strict=True))
    more = count * model_map.channel_parameters
    note = (
        f"MLP widths rounded up to multiples of {multiple}",
        f"{count:,} channels of the dense model are back: {more:,} parameters more than the pruned point of sparsity "
        f"{spec.sparsity:.4f}",
    )
    return replace(
        spec,
        layers=tuple(layers),
        sparsity=spec.sparsity - more / model_map.decoder_parameters,
        model_sparsity=spec.model_sparsity - more / model_map.parameters,
        options={**spec.options, **options},
        notes=(*spec.notes, note),
    )
