"""Pruned models of real shape with random weights: what an export of a run loads, made on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common.registry import WIDTH_MULTIPLE, Model
from benchmarks.common.synthetic import built, llama_settings
from gisp.model.structures import protected_layers

# How far a layer's share of what is removed is from the mean: runs take more from some layers than from others.
SPREAD = 0.3
PROTECT_FIRST, PROTECT_LAST = 0.1, 1


@dataclass(frozen=True)
class LayerShape:
    """Stored sizes of one decoder layer."""

    heads: int
    kv_heads: int
    channels: int


def pruned_layers(model: Model, sparsity: float) -> list[LayerShape]:
    """Sizes of every layer of a model pruned to about ``sparsity`` of its decoder parameters.

    The first tenth of the layers and the last stay dense; the others lose heads and channels in equal shares, which
    vary with depth. Where key/value heads are shared, whole ones go with their query heads.
    """
    protected = protected_layers(model.layers, PROTECT_FIRST, PROTECT_LAST)
    open_layers = [layer for layer in range(model.layers) if layer not in protected]
    share = sparsity * model.layers / len(open_layers)
    shapes = []
    for layer in range(model.layers):
        if layer in protected:
            shapes.append(LayerShape(model.heads, model.kv_heads, model.channels))
            continue
        # A whole period over the open layers: the mean stays.
        angle = 2 * math.pi * (open_layers.index(layer) + 0.5) / len(open_layers)
        kept = 1 - share * (1 + SPREAD * math.cos(angle))
        kv_heads = max(1, round(model.kv_heads * kept))
        channels = max(WIDTH_MULTIPLE, round(model.channels * kept / WIDTH_MULTIPLE) * WIDTH_MULTIPLE)
        shapes.append(LayerShape(kv_heads * (model.heads // model.kv_heads), kv_heads, channels))
    return shapes


def decoder_parameters(model: Model, layers: list[LayerShape]) -> int:
    """Parameters of decoder layers of these sizes, norms included."""
    per_layer = (
        2 * model.hidden * model.head_dim * (item.heads + item.kv_heads) + 3 * model.hidden * item.channels
        for item in layers
    )
    return sum(per_layer) + 2 * model.hidden * len(layers)


def build_pruned(model: Model, layers: list[LayerShape], device: torch.device, dtype: torch.dtype) -> Any:
    """A language model of these sizes, of the classes that exports bring along."""
    from gisp.export.modeling_gisp import classes_of

    widths = {
        number: {
            "num_attention_heads": item.heads,
            "num_key_value_heads": item.kv_heads,
            "intermediate_size": item.channels,
        }
        for number, item in enumerate(layers)
    }
    settings = {**llama_settings(model), "per_layer_config": widths}
    config, _, language_model, _ = classes_of("gisp_llama")
    return built(language_model, config(**settings), device, dtype)
