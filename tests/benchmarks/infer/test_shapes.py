"""Sizes of a sparsity."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.registry import MODELS, REAL
from benchmarks.infer.shapes import LayerShape, build_pruned, decoder_parameters, pruned_layers

CPU = torch.device("cpu")
TINY = MODELS["tiny"]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.3, 0.4, 0.5])
def test_sizes_have_the_sparsity_they_are_made_for(name: str, sparsity: float) -> None:
    model = MODELS[name]
    layers = pruned_layers(model, sparsity)
    dense = decoder_parameters(model, pruned_layers(model, 0.0))
    assert 1 - decoder_parameters(model, layers) / dense == pytest.approx(sparsity, abs=0.005)
    assert all(item.channels % 16 == 0 and item.heads % item.kv_heads == 0 for item in layers)
    assert layers[0] == layers[-1] == LayerShape(model.heads, model.kv_heads, model.channels)
    assert (len(set(layers)) > 3) == (sparsity > 0)


def test_parameters_are_those_of_the_model() -> None:
    layers = pruned_layers(TINY, 0.4)
    built = build_pruned(TINY, layers, CPU, torch.float32)
    assert sum(p.numel() for p in built.model.layers.parameters()) == decoder_parameters(TINY, layers)
