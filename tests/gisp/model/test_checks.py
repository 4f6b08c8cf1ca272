"""What is no prunable model is refused by a line that names what was given and what to do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokens
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForSequenceClassification

import gisp
from gisp.errors import GispError
from gisp.model.structures import map_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PRUNE: dict[str, Any] = {"sparsity": 0.2, "steps": 1, "align": 1, "protect_first": 0, "protect_last": 0}


def model_of(model_type: str, **settings: Any) -> Any:
    config_class = CONFIG_MAPPING[model_type]
    torch.manual_seed(0)
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return classes[config_class](config_class(**{**SIZES, **settings})).eval()


def test_compiled_models_name_the_model_inside() -> None:
    with pytest.raises(GispError, match=r"compiled by torch.compile: give the model .* model._orig_mod"):
        map_model(torch.compile(tiny_model()))


def test_models_with_adapters_are_to_be_merged() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(GispError, match=r"carries peft adapters .*merge_and_unload"):
            map_model(model)
    assert map_model(adapted.merge_and_unload()).num_heads == 4


def test_a_bare_decoder_is_told_from_a_language_model() -> None:
    with pytest.raises(GispError, match=r"LlamaModel is a decoder without output embeddings"):
        map_model(tiny_model().model)


def test_a_classifier_is_told_from_a_language_model() -> None:
    config = tiny_model().config
    with pytest.raises(GispError, match=r"LlamaForSequenceClassification predicts no tokens, .*: give a causal"):
        map_model(AutoModelForSequenceClassification.from_config(config))


def test_float64_is_not_called_quantised() -> None:
    with pytest.raises(GispError, match=r"holds float64 weights: convert the model first, model.float\(\)"):
        map_model(tiny_model().double())


def test_inference_mode_is_named() -> None:
    model = tiny_model()
    with torch.inference_mode(), pytest.raises(GispError, match=r"torch.inference_mode is on"):
        gisp.prune(model, tiny_tokens(), **PRUNE)
    with torch.inference_mode():
        made_inside = tiny_model()
    with pytest.raises(GispError, match=r"was made in torch.inference_mode .* load the model outside it"):
        gisp.prune(made_inside, tiny_tokens(), **PRUNE)


def test_autocast_is_named() -> None:
    model = tiny_model()
    bf16 = torch.bfloat16
    with torch.autocast("cpu", bf16), pytest.raises(GispError, match="autocast is on for cpu, pruning computes"):
        gisp.prune(model, tiny_tokens(), **PRUNE)
    gisp.prune(model, tiny_tokens(), **PRUNE)
    with torch.autocast("cpu", bf16), pytest.raises(GispError, match="autocast is on for cpu, compensation computes"):
        gisp.compensate(model, tiny_tokens())


def _on_meta(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.to("meta")


def _cast_norm(model: Any) -> None:
    model.model.norm.to(torch.bfloat16)


def _cast_mlp(model: Any) -> None:
    model.model.layers[1].mlp.to(torch.bfloat16)


def _expanded(model: Any) -> None:
    linear = model.model.layers[1].mlp.gate_proj
    linear.weight = torch.nn.Parameter(linear.weight.data[:1].expand_as(linear.weight))


def _overlapping(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    memory = torch.randn(2 * mlp.up_proj.out_features, mlp.up_proj.in_features)
    mlp.gate_proj.weight = torch.nn.Parameter(memory[: mlp.up_proj.out_features])
    mlp.up_proj.weight = torch.nn.Parameter(memory[1 : 1 + mlp.up_proj.out_features])


def _columns_first(model: Any) -> None:
    linear = model.model.layers[1].self_attn.o_proj
    linear.weight = torch.nn.Parameter(linear.weight.data.t().contiguous().t())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_on_meta, r"layers.1.mlp.down_proj.weight has no memory, it is on meta: load"),
        (_cast_norm, r"float32, model.norm.weight is torch.bfloat16: convert the model to one dtype"),
        (_cast_mlp, r"float32, model.layers.1.mlp.gate_proj.weight is torch.bfloat16: convert"),
        (_expanded, r"layers.1.mlp.gate_proj.weight \[\d+, \d+\] is expanded from less memory: give it"),
        (_overlapping, r"cannot be moved in place, copy them first: .* share memory"),
        (_columns_first, r"cannot be moved in place, copy them first: rows of the .* must be contiguous"),
    ],
)
def test_weights_that_cannot_be_moved_or_multiplied_are_named(change: Any, line: str) -> None:
    model = tiny_model()
    change(model)
    with pytest.raises(GispError, match=line):
        gisp.prune(model, tiny_tokens(), **PRUNE)


def test_weights_that_stand_in_a_layer_and_outside_are_named() -> None:
    model = tiny_model()
    model.lm_head.weight = model.model.layers[1].mlp.gate_proj.weight
    with pytest.raises(GispError, match=r"mlp.gate_proj.weight of layer 1 is lm_head.weight: give a model whose"):
        map_model(model)


def test_weights_that_stand_twice_are_named() -> None:
    twice = tiny_model()
    twice.model.layers[2] = twice.model.layers[1]
    one = tiny_model()
    one.model.layers[2].mlp.up_proj.weight = one.model.layers[1].mlp.up_proj.weight
    within = tiny_model()
    within.model.layers[1].mlp.up_proj.weight = within.model.layers[1].mlp.gate_proj.weight
    for model, place in (
        (twice, "self_attn.q_proj.weight of layer 2 is self_attn.q_proj.weight of layer 1"),
        (one, "mlp.up_proj.weight of layer 2 is mlp.up_proj.weight of layer 1"),
        (within, "mlp.up_proj.weight of layer 1 is mlp.gate_proj.weight of layer 1"),
    ):
        with pytest.raises(GispError, match=f"{place}: give a model whose layers share no weights"):
            gisp.prune(model, tiny_tokens(), **PRUNE)


@pytest.mark.parametrize("model_type", ["gemma2", "vaultgemma"])
def test_other_attention_is_named(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type, head_dim=8)
    with pytest.raises(GispError, match=f"'{model_type}' does not attend by scaled dot-product attention alone"):
        map_model(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(GispError, match=f"'{model_type}' does not attend by scaled dot-product attention alone"):
        gisp.prune(tmp_path, tiny_tokens(), **PRUNE)


def test_heads_that_depend_on_one_another_are_refused_and_the_model_is_as_before() -> None:
    model = model_of("diffllama", head_dim=16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(GispError, match="'diffllama' has Llama's projections but uses them in another way"):
        gisp.prune(model, tiny_tokens(), **PRUNE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_lists_of_norms_one_for_each_head_are_refused() -> None:
    with pytest.raises(GispError, match=r"self_attn.q_layernorm.norms.0.weight \[8\] spans heads"):
        map_model(model_of("stablelm", qk_layernorm=True))


@pytest.mark.parametrize("gqa", ["query", "group"])
def test_a_kind_never_tried_is_pruned_with_a_word_on_its_exports(gqa: str) -> None:
    """It is Llama by another name: the trial pruning must change nothing of the run."""
    known = gisp.prune(tiny_model(), tiny_tokens(), gqa=gqa, **PRUNE)
    model = tiny_model()
    model.config.model_type = "never-tried"
    with pytest.warns(UserWarning, match="'never-tried' can be exported with --format masked alone"):
        found = gisp.prune(model, tiny_tokens(), gqa=gqa, **PRUNE)
    assert all(torch.equal(at, known.removed_at[name]) for name, at in found.removed_at.items())
    assert found.steps[0].loss == known.steps[0].loss


def test_sequences_beyond_the_positions_of_a_model_are_told() -> None:
    with pytest.warns(UserWarning, match=r"sequences of 65 tokens are longer than the 64 positions"):
        gisp.prune(tiny_model(), tiny_tokens(length=65), **PRUNE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gisp.prune(tiny_model(), tiny_tokens(length=64), **PRUNE)


def test_modules_that_keep_the_number_of_heads_are_told() -> None:
    model = model_of("stablelm")
    trajectory = gisp.prune(model, tiny_tokens(), **{**PRUNE, "sparsity": 0.4, "steps": 2, "gqa": "query"})
    assert len(trajectory.steps) == 2
    heads = [getattr(layer.self_attn, "num_heads", None) for layer in model.model.layers]
    assert heads == [layer.self_attn.q_proj.out_features // 8 for layer in model.model.layers]
    assert sum(heads) < 8
