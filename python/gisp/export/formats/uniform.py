"""Export with one MLP width and one number of heads for all layers: a stock checkpoint, at some cost in quality.

**Size.** All layers get the number of query heads nearest to the mean number the pruned point keeps, and then the MLP
width with which the decoder layers come nearest to the parameters that the kept structures of the pruned point need.
Of two equally near sizes the smaller one is taken. So heads and channels are split as the run split them, as far as
whole heads allow.

**Heads that share key/value heads.** Every key/value head keeps equally many query heads and all of them stay, unless
the run removed whole key/value heads: then whole ones go here as well.

**Structures.** Each layer keeps those the run removed last (never removed first, ties: lowest index). A layer that is
wider than the common size loses more than the pruned point did; a narrower one gets structures back, with the weights
of the dense model. Structures that the run never removed have no order: where a layer must lose some of them the choice
is arbitrary. A run that went much further than the sparsity exported, with no protected layers, orders nearly all of
them, and its uniform exports are far better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MistralConfig, MistralForCausalLM

from gisp.errors import GispError
from gisp.export.card import UNIFORM
from gisp.export.check import write_checked
from gisp.export.formats.hf import check_family, config_values, pruned_state
from gisp.export.relayout import plan_layers
from gisp.export.sizes.options import SizeOptions, option_text
from gisp.export.sizes.rounding import kept_parameters, require_ranking
from gisp.export.spec import ExportReport, LayerRanking, PrunedSpec, gisp_record, map_checked
from gisp.model.keep import Keep, kv_heads
from gisp.model.structures import ModelMap


@dataclass(frozen=True)
class UniformSize:
    """What every layer stores."""

    heads: int
    kv_heads: int
    channels: int


def uniform_spec(base: Any, spec: PrunedSpec, options: SizeOptions | None = None) -> PrunedSpec:
    """The pruned point with one size for all layers.

    Args:
        base: the dense model the spec was made from.
        options: what the common sizes are rounded to; without ``round_mlp`` the width multiple of the run.

    Raises:
        GispError: a spec without ranking, or no number of heads that satisfies the options.
    """
    options = options or SizeOptions()
    given = options.given()
    model_map = map_checked(base, spec.keep)
    require_ranking(spec, "a uniform export")
    size = uniform_size(base, model_map, spec, options)
    keep = Keep(*zip(*(_kept(model_map, size, ranking) for ranking in spec.ranking), strict=True))
    dense = kept_parameters(model_map, range(model_map.num_heads), model_map.intermediate_size)
    removed = sum(dense - kept_parameters(model_map, heads, len(channels)) for heads, channels in keep.layers)
    return replace(
        spec,
        keep=keep,
        sparsity=removed / model_map.decoder_parameters,
        model_sparsity=removed / model_map.parameters,
        options={**spec.options, **given},
        notes=(*spec.notes, *_notes(base, spec, keep, size), *_arbitrary(spec, keep)),
    )


def uniform_size(base: Any, model_map: ModelMap, spec: PrunedSpec, options: SizeOptions) -> UniformSize:
    """The common size of all layers, see the top of this file.

    Raises:
        GispError: no number of heads satisfies the options.
    """
    layers = len(spec.keep.heads)
    mean = sum(map(len, spec.keep.heads)) / layers
    allowed = [
        pair
        for pair in _head_counts(model_map, spec)
        if _splits(*pair, options.align_heads or 1)
        and pair[0] >= (options.min_heads or 1)
        and _stock_classes(base, pair[0]) is not None
    ]
    if not allowed:
        raise GispError(
            f"no number of heads up to {model_map.num_heads} on {model_map.num_kv_heads} key/value heads satisfies "
            f"{option_text(options.given())}: give less, or --format hf"
        )
    heads, kv_count = min(allowed, key=lambda pair: (abs(pair[0] - mean), pair[0]))
    attention = kept_parameters(model_map, _first_heads(heads, kv_count, model_map.heads_per_kv), 0)
    needed = sum(kept_parameters(model_map, kept, len(channels)) for kept, channels in spec.keep.layers)
    budget = needed / layers - attention
    multiple = options.round_mlp or int((spec.run.get("config") or {}).get("align") or 1)
    wanted = budget / model_map.channel_parameters
    return UniformSize(heads, kv_count, _nearest_multiple(wanted, multiple, model_map.intermediate_size))


def export_uniform(base: Any, spec: PrunedSpec, out: Path, *, tokenizer_from: Path | None = None) -> ExportReport:
    """Write a checkpoint of the base model's own kind that plain transformers load without remote code.

    Where a Llama's new number of heads does not divide its hidden size, which ``LlamaConfig`` refuses, the checkpoint
    is a Mistral one: the same computation without that rule.

    Args:
        base, out, tokenizer_from: as for :func:`gisp.export.check.write_checked`.
        spec: what to keep, of one size in all layers (see :func:`uniform_spec`).

    Raises:
        GispError: unsupported model type, layers of several sizes, or an error of ``write_checked``.
    """
    model_map = map_checked(base, spec.keep)
    check_family(model_map)
    layouts = plan_layers(model_map, spec.keep)
    sizes = {
        UniformSize(len(layout.query), len(layout.kv), max(len(channels), 1))
        for channels, layout in zip(spec.keep.channels, layouts, strict=True)
    }
    if len(sizes) != 1:
        raise GispError(f"the layers have {len(sizes)} different sizes: round them to one with uniform_spec first")
    config = stock_config(base, model_map, spec, sizes.pop())
    weights = pruned_state(base, model_map, spec.keep, layouts)
    return write_checked(base, model_map, spec, out, weights, config, tokenizer_from, UNIFORM)


def stock_config(base: Any, model_map: ModelMap, spec: PrunedSpec, size: UniformSize) -> Any:
    """The base model's configuration with other sizes.

    Raises:
        GispError: no stock class takes that many heads of that size.
    """
    classes = _stock_classes(base, size.heads)
    if classes is None:
        raise _no_stock(model_map, size, "with biases")
    config_class, model_class = classes
    values = config_values(base, model_map)
    if config_class is not type(base.config):
        for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
            values.pop(key, None)
        values["sliding_window"] = None
    values.update(
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.channels,
        architectures=[model_class.__name__],
        gisp={**gisp_record(base, spec), "uniform": True},
    )
    try:
        config = config_class(**values)
        with torch.device("meta"):
            attention = model_class(config).model.layers[0].self_attn
    except (ValueError, StrictDataclassError):
        raise _no_stock(model_map, size, f"of type {model_map.model_type!r}") from None
    if attention.q_proj.out_features != size.heads * model_map.head_dim:
        # Its classes take the size of a head from the number of heads.
        raise _no_stock(model_map, size, f"of {model_map.head_dim}, of type {model_map.model_type!r}")
    return config


def _no_stock(model_map: ModelMap, size: UniformSize, what: str) -> GispError:
    hidden = model_map.hidden_size
    return GispError(f"no stock model has {size.heads} heads {what} and hidden size {hidden}: use --format hf")


def _stock_classes(base: Any, heads: int) -> tuple[type, type] | None:
    """Configuration and model class that take the base model's weights with another number of heads."""
    config = base.config
    if config.model_type != "llama" or config.hidden_size % heads == 0:
        return type(config), type(base)
    return None if config.attention_bias or config.mlp_bias else (MistralConfig, MistralForCausalLM)


def _head_counts(model_map: ModelMap, spec: PrunedSpec) -> list[tuple[int, int]]:
    """Numbers of query and key/value heads a layer may get, ascending."""
    share, most = model_map.heads_per_kv, model_map.num_kv_heads
    if share == 1 or all(_whole_groups(heads, share) for heads in spec.keep.heads):
        return [(share * count, count) for count in range(1, most + 1)]
    return [(most * count, most) for count in range(1, share + 1)]


def _whole_groups(heads: Sequence[int], share: int) -> bool:
    """Whether every key/value head has all or none of its query heads among the given ones."""
    return len(heads) == share * len(kv_heads(heads, share))


def _splits(heads: int, kv_heads: int, align: int) -> bool:
    """Whether ``align`` devices can share the heads."""
    return heads % align == 0 and (kv_heads % align == 0 or align % kv_heads == 0)


def _first_heads(heads: int, kv_heads: int, share: int) -> tuple[int, ...]:
    """As many query heads on as many key/value heads of a dense layer, the first ones."""
    return tuple(kv * share + head for kv in range(kv_heads) for head in range(heads // kv_heads))


def _nearest_multiple(wanted: float, multiple: int, most: int) -> int:
    """The multiple from ``multiple`` to ``most``, or ``most`` itself, that is nearest; the smaller of two."""
    return min((*range(multiple, most, multiple), most), key=lambda width: (abs(width - wanted), width))


def _kept(model_map: ModelMap, size: UniformSize, ranking: LayerRanking) -> tuple[tuple[int, ...], ...]:
    """Heads and channels of one layer that went last, as many as the common size has."""
    share = model_map.heads_per_kv
    of_kv: dict[int, list[int]] = {}
    for head in ranking.heads:
        of_kv.setdefault(head // share, []).append(head)
    # Dictionaries keep their order: key/value heads come in that of their last head to go.
    heads = [members[: size.heads // size.kv_heads] for members in list(of_kv.values())[: size.kv_heads]]
    stay = (head for members in heads for head in members)
    return tuple(sorted(stay)), tuple(sorted(ranking.channels[: size.channels]))


def _arbitrary(spec: PrunedSpec, keep: Keep) -> list[tuple[str, str]]:
    """A row of the model card if layers lost structures that the run never removed."""
    tied_heads, tied_channels = zip(*((item.tied_heads, item.tied_channels) for item in spec.ranking), strict=True)
    heads, channels = (
        sum(max(tied - len(kept), 0) for tied, kept in zip(*pair, strict=True))
        for pair in ((tied_heads, keep.heads), (tied_channels, keep.channels))
    )
    if not heads and not channels:
        return []
    return [
        (
            "chosen without any order",
            f"{heads:,} heads and {channels:,} channels are gone that the run never removed (those of lowest index "
            "stayed). A longer run orders them: `gisp prune ... --sparsity 0.9 --protect-first 0 --protect-last 0`, "
            "then export this sparsity of it",
        )
    ]


def _notes(base: Any, spec: PrunedSpec, keep: Keep, size: UniformSize) -> list[tuple[str, str]]:
    """Rows of the model card: the common size and how far it is from the pruned point."""

    def difference(of: Keep, without: Keep) -> str:
        heads, channels = (
            sum(len(set(a) - set(b)) for a, b in zip(*layers, strict=True))
            for layers in ((of.heads, without.heads), (of.channels, without.channels))
        )
        return f"{heads:,} heads and {channels:,} channels"

    classes = _stock_classes(base, size.heads)
    name = classes[1].__name__ if classes else type(base).__name__
    return [
        (
            "size of every layer",
            f"{size.heads} query heads, {size.kv_heads} key/value heads, {size.channels} MLP channels ({name})",
        ),
        (
            "made from",
            f"the pruned point of sparsity {spec.sparsity:.4f}, whose layers differ in size: "
            f"{difference(spec.keep, keep)} of it are gone, {difference(keep, spec.keep)} of the dense model "
            "are back",
        ),
    ]
