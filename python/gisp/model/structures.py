"""The structure map: decoder layers of a model and the heads and channels that can be removed from them.

It is found from the modules, not from the model's name: Llama, Mistral, Qwen2/2.5, Qwen3 and everything built like
them (DeepSeek-R1-Distill) share one layout, with or without biases, query/key norms, grouped key/value heads and
tied embeddings. :data:`gisp_kernels.groups.PROJECTIONS` says which weights that layout consists of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gisp.errors import GispError
from gisp.mapped import give_back
from gisp.model.checks import SUPPORTED, check_layer, check_linear, check_model, check_unshared
from gisp_kernels.groups import (
    PROJECTIONS,
    LayerProjection,
    StructureGroup,
    attention_group,
    mlp_group,
    projections_of,
)

_FINGERPRINT_SAMPLES = 256


def heads_name(layer: int) -> str:
    """Name of the group of a layer's heads."""
    return f"layers.{layer}.heads"


def channels_name(layer: int) -> str:
    """Name of the group of a layer's channels."""
    return f"layers.{layer}.channels"


def structure_parameters(layers: int) -> Iterator[tuple[int, str, LayerProjection]]:
    """Layer, name and projection of every weight, and of every bias there may be, that structures own a part of."""
    for layer in range(layers):
        for item in PROJECTIONS:
            for part in item.parts:
                yield layer, f"model.layers.{layer}.{item.module}.{item.name}.{part}", item


@dataclass(frozen=True)
class LayerMap:
    """One decoder layer: its modules and its two groups, named ``layers.{i}.heads`` and ``layers.{i}.channels``.

    A structure of ``heads`` is a query head or, with ``gqa`` "group", a key/value head with all its query heads.
    """

    index: int
    layer: Any
    attention: Any
    heads: StructureGroup
    channels: StructureGroup


@dataclass(frozen=True, repr=False)
class ModelMap:
    """Everything the pruning loop needs to know about a dense model.

    Attributes:
        gqa: what is removed where query heads share key/value heads (:data:`gisp.config.options.GQA_MODES`); ``query``
            where none do.
        decoder_parameters: all parameters of the decoder layers, norms included.
        parameters: all parameters of the model (tied ones once).
        biased: names of the projections whose rows have biases.
    """

    model: Any
    layers: tuple[LayerMap, ...]
    model_type: str
    hidden_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    decoder_parameters: int
    parameters: int
    gqa: str = "query"
    biased: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"<ModelMap of {self.model_type}: {len(self.layers)} layers, {self.parameters:,} parameters>"

    @property
    def weight(self) -> torch.Tensor:
        """A weight of the model for its device and dtype, one of this process where others hold layers too."""
        first: torch.Tensor = next(iter(self.model.parameters()))
        if not first.is_meta:
            return first
        held = (item.attention.o_proj.weight for item in self.layers)
        return next((weight for weight in held if not weight.is_meta), first)

    @property
    def shares_kv(self) -> bool:
        """Whether several query heads share a key/value head."""
        return self.num_kv_heads != self.num_heads

    @property
    def head_weights(self) -> int:
        """Weights that score a query head: 4*head_dim*hidden, with shared key/value heads 2*head_dim*hidden."""
        return (2 if self.shares_kv else 4) * self.head_dim * self.hidden_size

    @property
    def query_parameters(self) -> int:
        """Parameters of a query head: its rows of q with their biases, its columns of o."""
        return self.head_dim * (2 * self.hidden_size + self._biases("q_proj"))

    @property
    def kv_parameters(self) -> int:
        """Parameters of a key/value head: its rows of k and v with their biases."""
        return self.head_dim * (2 * self.hidden_size + self._biases("k_proj", "v_proj"))

    @property
    def head_parameters(self) -> int:
        """Parameters that go with a query head: its key/value head goes along where it has one of its own."""
        return self.query_parameters + (0 if self.shares_kv else self.kv_parameters)

    @property
    def heads_per_kv(self) -> int:
        """Query heads of the dense model that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_group_weights(self) -> int:
        """Weights that score a key/value head with all its query heads."""
        return (2 * self.heads_per_kv + 2) * self.head_dim * self.hidden_size

    @property
    def kv_group_parameters(self) -> int:
        """Parameters that go with a key/value head and all its query heads."""
        return self.heads_per_kv * self.query_parameters + self.kv_parameters

    @property
    def heads_per_structure(self) -> int:
        """Query heads of one structure of a layer's ``heads`` group."""
        return self.heads_per_kv if self.gqa == "group" else 1

    def members(self, group: StructureGroup) -> int:
        """Query heads or channels of one structure of a group."""
        return self.heads_per_structure if group.kind == "heads" else 1

    @property
    def channel_weights(self) -> int:
        """Weights that score a channel, 3*hidden: a row of gate and up, a column of down."""
        return 3 * self.hidden_size

    @property
    def channel_parameters(self) -> int:
        """Parameters that go with a channel: its weights and the biases of its rows."""
        return self.channel_weights + self._biases("gate_proj", "up_proj")

    @property
    def outputs(self) -> dict[str, tuple[nn.Linear, int]]:
        """By group: the output projection of its block, and the input columns of a query head or channel."""
        found: dict[str, tuple[nn.Linear, int]] = {}
        for item in self.layers:
            found[item.heads.name] = (item.attention.o_proj, self.head_dim)
            found[item.channels.name] = (item.layer.mlp.down_proj, 1)
        return found

    @property
    def groups(self) -> list[StructureGroup]:
        """All groups: heads in layer order, then channels in layer order."""
        return [m.heads for m in self.layers] + [m.channels for m in self.layers]

    def describe(self) -> dict[str, str | int]:
        """Sizes of the model by name, as ``gisp inspect`` shows them."""
        return {
            "model_type": self.model_type,
            "layers": len(self.layers),
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "decoder_parameters": self.decoder_parameters,
            "parameters": self.parameters,
        }

    def _biases(self, *projections: str) -> int:
        return sum(name in self.biased for name in projections)


def map_model(model: Any, gqa: str = "query") -> ModelMap:
    """The structure map of a dense model.

    Args:
        gqa: one of :data:`gisp.config.options.GQA_MODES`; where every query head has its own key/value head they are
            all the same.

    Raises:
        GispError: the layout is not one this project prunes; the message names the first thing that differs. Or the
            model is a pruned export or of a nested checkpoint.
    """
    config = getattr(model, "config", None)
    pruned = getattr(config, "gisp", None) or {}
    if pruned and not (pruned.get("masked") or pruned.get("uniform")):
        raise GispError("an exported model of pruned shapes is not pruned again: give its dense base model")
    check_model(model)
    model_type = str(getattr(config, "model_type", type(model).__name__))
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise GispError(f"model type {model_type!r} has no decoder layers at model.layers: {SUPPORTED}")
    maps = tuple(_map_layer(i, layer, model_type) for i, layer in enumerate(layers))
    for item in maps:
        check_layer(item.layer, f"layer {item.index} of model type {model_type!r}")
    check_unshared(model, layers)
    first = maps[0].attention
    head_dim = int(first.head_dim)
    num_heads = first.q_proj.out_features // head_dim
    num_kv_heads = first.k_proj.out_features // head_dim
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise GispError(f"{num_heads} query heads on {num_kv_heads} key/value heads: {SUPPORTED}")
    for item in maps:
        if item.heads.count != num_heads or item.channels.count != maps[0].channels.count:
            raise GispError(
                f"layer {item.index} has {item.heads.count} heads and {item.channels.count} channels, layer 0 has "
                f"{num_heads} and {maps[0].channels.count}: this model is already pruned, give the dense one"
            )
    gqa = gqa if num_heads != num_kv_heads else "query"
    if gqa == "group":
        maps = tuple(_with_kv_groups(item) for item in maps)
    return ModelMap(
        model=model,
        layers=maps,
        model_type=model_type,
        hidden_size=first.q_proj.in_features,
        head_dim=head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=maps[0].channels.count,
        vocab_size=model.get_input_embeddings().num_embeddings,
        decoder_parameters=sum(p.numel() for p in layers.parameters()),
        parameters=sum(p.numel() for p in model.parameters()),
        gqa=gqa,
        biased=_biased(maps[0].layer),
    )


def _biased(layer: Any) -> frozenset[str]:
    rows = (item for item in PROJECTIONS if item.axis == "row")
    return frozenset(item.name for item in rows if getattr(getattr(layer, item.module), item.name).bias is not None)


def _with_kv_groups(item: LayerMap) -> LayerMap:
    return replace(item, heads=attention_group(item.heads.name, item.attention, whole_kv_groups=True))


def _map_layer(index: int, layer: nn.Module, model_type: str) -> LayerMap:
    where = f"layer {index} of model type {model_type!r}"
    blocks = []
    for attribute in ("self_attn", "mlp"):
        block = getattr(layer, attribute, None)
        if not isinstance(block, nn.Module):
            raise GispError(f"{where} has no {attribute!r} module: {SUPPORTED}")
        names = [item.name for item in projections_of(attribute)]
        linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        if linears != set(names):
            found = ", ".join(sorted(linears)) or "none"
            raise GispError(f"{where}: {attribute} has the Linear layers {found}, not {', '.join(names)}: {SUPPORTED}")
        blocks.append(block)
    attention, mlp = blocks
    for block in blocks:
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):
                check_linear(linear, f"{where}: {name}")
    if not hasattr(attention, "head_dim"):
        raise GispError(f"{where}: self_attn has no head_dim: {SUPPORTED}")
    try:
        heads = attention_group(heads_name(index), attention)
        channels = mlp_group(channels_name(index), mlp)
    except ValueError as error:
        raise GispError(f"{where}: {error}: {SUPPORTED}") from None
    return LayerMap(index, layer, attention, heads, channels)


def protected_layers(layers: int, first: float, last: int) -> frozenset[int]:
    """Layers that are never pruned: the first ``int(first * layers)`` and the last ``last``.

    Raises:
        GispError: the last ones are all.
    """
    if last >= layers:
        raise GispError(f"--protect-last is {last} with {layers} layers: nothing is left to prune, give less")
    return frozenset(range(int(first * layers))) | frozenset(range(layers - last, layers))


def fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes, sampled values and checksums of all parameters of a dense model.

    Values are rounded to bfloat16 first, so that loading the same checkpoint in another dtype keeps the hash. Samples
    alone would miss a single changed weight, sums alone an exchange of weights.
    """
    return fingerprint_of(fingerprint_parts(model))


def fingerprint_parts(model: nn.Module) -> dict[str, bytes]:
    """What of every parameter that lies in this process goes into the fingerprint."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            found[name] = _fingerprint_part(name, parameter)
            give_back(parameter)
    return found


def fingerprint_of(parts: Mapping[str, bytes]) -> str:
    """The fingerprint of a model with such parameters."""
    digest = hashlib.sha256()
    for _, part in sorted(parts.items()):
        digest.update(part)
    return digest.hexdigest()


def _fingerprint_part(name: str, parameter: torch.Tensor) -> bytes:
    # A weight that one column is kept of is a view with gaps even when it is flat.
    flat = parameter.detach().reshape(-1).to(torch.bfloat16).contiguous().view(torch.int16)
    count = min(_FINGERPRINT_SAMPLES, flat.numel())
    index = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    values = flat[index].cpu().numpy().tobytes() + _checksum(flat).cpu().numpy().tobytes()
    return f"{name}{tuple(parameter.shape)}".encode() + values


def _checksum(values: torch.Tensor) -> torch.Tensor:
    """Sum modulo 2**64 of int16 [n], four at a time: reading 64 bits at once is 20 times faster on a CPU."""
    whole = values.numel() // 4 * 4
    aligned = values.data_ptr() % 8 == 0 and values.storage_offset() % 4 == 0
    words = values[:whole] if aligned else values[:whole].clone()
    return words.view(torch.int64).sum() + values[whole:].sum(dtype=torch.int64)


def first_bad_parameter(model: nn.Module) -> str | None:
    """Name of the first parameter of this process holding NaN or infinity, or None."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.numel():
            continue
        # Extremes pass NaN on; looking at every number would take 50 times as long on a CPU.
        if not bool(torch.isfinite(torch.stack(torch.aminmax(parameter.detach()))).all()):
            return name
        give_back(parameter)
    return None
