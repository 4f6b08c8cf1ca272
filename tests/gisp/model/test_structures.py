"""The structure map: what of a decoder layer must move with its structures, and which models are mapped at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import dense, spec_of
from tiny import tiny_model
from torch import nn
from transformers import BitNetConfig, BitNetForCausalLM

import gisp
from gisp.errors import GispError
from gisp.export.formats.hf import export_hf
from gisp.export.formats.masked import export_masked
from gisp.model.structures import fingerprint, map_model, structure_parameters


def bitnet() -> Any:
    """Llama-like layers with a norm over all heads before o_proj and one over all channels before down_proj."""
    config = BitNetConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return BitNetForCausalLM(config)


def test_norms_over_heads_or_channels_are_refused() -> None:
    model = bitnet()
    with pytest.raises(GispError, match=r"layer 0 .*'bitnet'.*self_attn.attn_sub_norm.weight \[32\] spans heads or ch"):
        map_model(model)
    for layer in model.model.layers:
        layer.self_attn.attn_sub_norm = nn.Identity()
    with pytest.raises(GispError, match=r"mlp.ffn_sub_norm.weight \[24\] spans heads or channels: layers with Llama's"):
        map_model(model)
    for layer in model.model.layers:
        layer.mlp.ffn_sub_norm = nn.Identity()
    assert len(map_model(model).layers) == 2


@pytest.mark.parametrize(
    ("place", "shape"),
    [("self_attn", (4,)), ("self_attn", (8, 4)), ("mlp", (3, 24)), ("", (24,))],
)
def test_single_parameters_that_span_structures_are_refused(place: str, shape: tuple[int, ...]) -> None:
    model = tiny_model("llama-mha")
    model.model.layers[1].get_submodule(place).register_parameter("extra", nn.Parameter(torch.zeros(shape)))
    with pytest.raises(GispError, match=r"layer 1 .*extra \["):
        map_model(model)


def test_norms_of_single_heads_and_of_the_layer_are_accepted() -> None:
    model = tiny_model("qwen3")
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (model.config.head_dim,)
    # As Gemma 2 has: more norms of the hidden size, outside the two blocks.
    for layer in model.model.layers:
        layer.pre_feedforward_layernorm = nn.RMSNorm(model.config.hidden_size)
    assert map_model(model).head_dim == model.config.head_dim


def test_the_table_names_every_parameter_that_pruning_moves() -> None:
    model = dense("llama-bias")
    named = dict(model.named_parameters())
    found = {name for _, name, _ in structure_parameters(4)}
    assert found <= set(named)
    left = {name.split(".layers.")[1].split(".", 1)[1] for name in set(named) - found if ".layers." in name}
    assert left == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.o_proj.bias",
        "mlp.down_proj.bias",
    }


def test_exports_of_pruned_shapes_are_not_mapped_and_dense_ones_are(tmp_path: Path) -> None:
    base = dense("llama-gqa")
    export_hf(base, spec_of(), tmp_path / "hf")
    export_masked(base, spec_of(), tmp_path / "masked")
    with pytest.raises(GispError, match="is not pruned again: give its dense base model"):
        map_model(gisp.load(tmp_path / "hf"))
    assert map_model(gisp.load(tmp_path / "masked")).num_heads == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", [0, 1, 2, 7])
def test_weights_that_are_views_have_the_fingerprint_of_tight_ones(kept: int, dtype: torch.dtype) -> None:
    """As those that compaction leaves, of any width."""
    dense_weight = torch.randn(9, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    view, tight = nn.Linear(kept, 9, bias=False), nn.Linear(kept, 9, bias=False)
    view.weight = nn.Parameter(dense_weight[:, :kept])
    tight.weight = nn.Parameter(dense_weight[:, :kept].clone(memory_format=torch.contiguous_format))
    assert fingerprint(view) == fingerprint(tight)
