"""One size for all layers: the size that is chosen, the structures that stay, and the stock checkpoint they make."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import (
    CHANNELS,
    FAMILIES,
    HEADS,
    KEPT,
    LLAMA3_ROPE,
    Kept,
    dense,
    export_one_size,
    layers_of,
    masked,
    ranked,
    spec_of,
    tokens,
)
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, MistralForCausalLM

import gisp
from gisp.errors import GispError
from gisp.export.folder import older_rope
from gisp.export.formats.masked import export_masked
from gisp.export.formats.uniform import export_uniform, uniform_spec
from gisp.export.sizes.options import SizeOptions
from gisp.export.spec import ExportReport, LayerRanking, PrunedSpec

WHOLE_GROUPS = (
    Kept(heads=(0, 1, 2, 3), channels=tuple(range(20))),
    Kept(heads=(), channels=tuple(range(30))),
    Kept(heads=(4, 5, 6, 7), channels=tuple(range(8))),
    Kept(heads=(4, 5, 6, 7), channels=tuple(range(40))),
)


def alive(base: Any, layers: tuple[Kept, ...]) -> int:
    """Elements of the decoder's weight matrices that can change an output, found by following every structure."""
    share = HEADS // (base.config.num_key_value_heads or HEADS)
    total = 0
    for layer, keep in zip(base.model.layers, layers, strict=True):
        width = layer.self_attn.head_dim
        masks = {name: torch.zeros_like(m.weight) for name, m in layer.named_modules() if hasattr(m, "in_features")}
        for head in keep.heads:
            kv = head // share
            masks["self_attn.q_proj"][head * width : (head + 1) * width] = 1
            masks["self_attn.o_proj"][:, head * width : (head + 1) * width] = 1
            masks["self_attn.k_proj"][kv * width : (kv + 1) * width] = 1
            masks["self_attn.v_proj"][kv * width : (kv + 1) * width] = 1
        for channel in keep.channels:
            masks["mlp.gate_proj"][channel] = masks["mlp.up_proj"][channel] = 1
            masks["mlp.down_proj"][:, channel] = 1
        total += int(sum(mask.sum() for mask in masks.values()))
    return total


def sizes(base: Any, counts: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Parameters, query heads and channels of every uniform size with the given (query, key/value) head counts."""
    share = HEADS // base.config.num_key_value_heads
    for heads, kv_heads in counts:
        chosen = tuple(kv * share + i for kv in range(kv_heads) for i in range(heads // kv_heads))
        one, two = (alive(base, (Kept(chosen, tuple(range(c))),) * 4) for c in (1, 2))
        for channels in range(1, CHANNELS + 1):
            yield one + (channels - 1) * (two - one), heads, channels


@pytest.mark.parametrize("layers", [KEPT, KEPT[::-1], WHOLE_GROUPS, (KEPT[3],) * 4, (KEPT[1],) * 4])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "mistral", "qwen3"])
def test_the_size_is_the_nearest_one(family: str, layers: tuple[Kept, ...]) -> None:
    base = dense(family)
    spec = ranked(spec_of(layers))
    found = uniform_spec(base, spec)
    kv_heads = base.config.num_key_value_heads
    if kv_heads == HEADS:
        counts = [(n, n) for n in range(1, HEADS + 1)]
    elif layers == WHOLE_GROUPS or layers == (KEPT[1],) * 4:
        counts = [(4, 1), (8, 2)]
    else:
        counts = [(2 * n, 2) for n in range(1, 5)]
    mean = sum(len(keep.heads) for keep in layers) / 4
    heads = min((abs(heads - mean), heads) for heads, _ in counts)[1]
    target = alive(base, layers)
    near = min((abs(n - target), channels) for n, h, channels in sizes(base, counts) if h == heads)
    assert {(len(keep.heads), len(keep.channels)) for keep in layers_of(found)} == {(heads, near[1])}
    removed = alive(base, (Kept(tuple(range(HEADS)), tuple(range(CHANNELS))),) * 4) - alive(base, layers_of(found))
    assert found.sparsity == pytest.approx(removed / sum(p.numel() for p in base.model.layers.parameters()))
    assert found.model_sparsity == pytest.approx(removed / sum(p.numel() for p in base.parameters()))


@pytest.mark.parametrize("layers", [KEPT, WHOLE_GROUPS])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa"])
def test_what_went_last_stays(family: str, layers: tuple[Kept, ...]) -> None:
    base, spec = dense(family), ranked(spec_of(layers), seed=4)
    share = HEADS // base.config.num_key_value_heads
    for keep, ranking in zip(layers_of(uniform_spec(base, spec)), spec.ranking, strict=True):
        assert set(keep.channels) == set(ranking.channels[: len(keep.channels)])
        if share == 1:
            assert set(keep.heads) == set(ranking.heads[: len(keep.heads)])
        elif layers == WHOLE_GROUPS:
            kv = ranking.heads[0] // 4
            assert keep.heads == tuple(range(4 * kv, 4 * kv + 4))
        else:
            for kv in range(2):
                own = [head for head in ranking.heads if head // 4 == kv]
                assert {head for head in keep.heads if head // 4 == kv} == set(own[: len(keep.heads) // 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_load_the_export_and_compute_the_masked_logits(family: str, tmp_path: Path) -> None:
    base = dense(family)
    spec = uniform_spec(base, ranked(spec_of()))
    report = export_uniform(base, spec, tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(model) is type(base)
    with torch.no_grad():
        wanted = masked(base, spec.keep)(input_ids=tokens()).logits
        for loaded in (model, gisp.load(tmp_path / "out")):
            got = loaded(input_ids=tokens()).logits
            assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert "per_layer_config" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    assert config["gisp"]["uniform"] is True
    assert config["gisp"]["sparsity"] == spec.sparsity
    assert report.parameters_pruned == sum(p.numel() for p in model.parameters()) < report.parameters_dense
    head_dim = base.model.layers[0].self_attn.head_dim
    assert config["head_dim"] == head_dim
    for item in report.sizes:
        assert item.query_heads == item.heads == config["num_attention_heads"]
        assert item.kv_heads == config["num_key_value_heads"]
        assert item.channels == config["intermediate_size"]
    for name in ("rope_parameters", "layer_types", "sliding_window", "tie_word_embeddings", "rms_norm_eps"):
        assert config.get(name) == base.config.to_dict().get(name), name
    assert model.generate(tokens()[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 7)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "llama3": LLAMA3_ROPE,
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 30000.0},
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("export", [export_masked, export_one_size])
def test_position_encodings_stand_under_the_names_of_older_readers_too(
    export: Callable[..., ExportReport], rope: str, tmp_path: Path
) -> None:
    base = dense("llama-gqa", rope_parameters=dict(ROPES[rope]))
    export(base, spec_of(), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == ROPES[rope]["rope_theta"]
    scaling = {name: value for name, value in ROPES[rope].items() if name != "rope_theta"}
    assert config.get("rope_scaling", {"rope_type": "default"}) == scaling
    # What older readers take alone is what is meant.
    del config["rope_parameters"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == base.config.rope_parameters


def test_encodings_that_differ_by_kind_of_layer_have_older_names() -> None:
    local, full = {"rope_type": "default", "rope_theta": 7.0}, {"rope_type": "linear", "factor": 8.0, "rope_theta": 9.0}
    config = Gemma3TextConfig(rope_parameters={"sliding_attention": dict(local), "full_attention": dict(full)})
    older = older_rope(config.to_dict())
    assert older == {
        "rope_local_base_freq": 7.0,
        "rope_theta": 9.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert Gemma3TextConfig(**older).rope_parameters == config.rope_parameters


def test_a_llama_whose_heads_do_not_divide_its_hidden_size_becomes_a_mistral(tmp_path: Path) -> None:
    layers = (Kept(tuple(range(5)), tuple(range(10))), Kept(tuple(range(1, 6)), tuple(range(30)))) * 2
    base, spec = dense("llama-mha"), ranked(spec_of(layers))
    rounded = uniform_spec(base, spec)
    export_uniform(base, rounded, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(model) is MistralForCausalLM
    assert "5 query heads, 5 key/value heads, 20 MLP channels (MistralForCausalLM)" in dict(rounded.notes).values()
    assert AutoConfig.from_pretrained(tmp_path / "out").num_attention_heads == 5
    with torch.no_grad():
        wanted = masked(base, rounded.keep)(input_ids=tokens(length=100)).logits
        got = model(input_ids=tokens(length=100)).logits
    assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_a_llama_with_biases_keeps_a_number_of_heads_its_class_takes(tmp_path: Path) -> None:
    """Mistral has no biases: only divisors of the hidden size are left; 6 of 8 on 2 key/value heads is none."""
    layers = (Kept((0, 1, 2, 4, 5, 6), tuple(range(10))),) * 4
    base = dense("llama-bias")
    assert len(layers_of(uniform_spec(dense("llama-gqa"), ranked(spec_of(layers))))[0].heads) == 6
    rounded = uniform_spec(base, ranked(spec_of(layers)))
    assert len(layers_of(rounded)[0].heads) == 4
    report = export_uniform(base, rounded, tmp_path / "out")
    assert report.relative_difference <= 1e-5
    with pytest.raises(GispError, match="no stock model has 6 heads with biases and hidden size 64"):
        export_uniform(base, spec_of(layers), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sizes_follow_the_options() -> None:
    spec = ranked(spec_of())

    def size(family: str, run: dict[str, Any] | None = None, **options: int) -> tuple[int, int]:
        rounded = uniform_spec(dense(family), replace(spec, run=run or spec.run), SizeOptions(**options))
        assert rounded.options == options
        return len(layers_of(rounded)[0].heads), len(layers_of(rounded)[0].channels)

    assert size("llama-mha") == (4, 15)
    assert size("llama-mha", round_mlp=4) == (4, 16)
    assert size("llama-mha", round_mlp=20) == (4, 20)
    assert size("llama-mha", round_mlp=100) == (4, 48)
    # The width multiple of the run, unless another one is asked for.
    assert size("llama-mha", run={"config": {"align": 20}}) == (4, 20)
    assert size("llama-mha", run={"config": {"align": 20}}, round_mlp=1) == (4, 15)
    assert size("llama-mha", align_heads=3)[0] == 3
    assert size("llama-mha", align_heads=8)[0] == 8
    # A head more takes the place of 4 * 8 * 64 / (3 * 64) = 10.7 channels.
    assert size("llama-mha", min_heads=5) == (5, 4)
    # Two key/value heads and align 4: shared by pairs of devices.
    assert size("llama-gqa", align_heads=4) == (4, 12)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "llama-mha",
            {"align_heads": 16},
            "no number of heads up to 8 on 8 .* satisfies --align-heads 16",
        ),
        ("llama-gqa", {"align_heads": 3}, "on 2 key/value heads satisfies --align-heads 3: give less"),
        ("llama-mha", {"min_heads": 9, "align_heads": 2}, "satisfies --align-heads 2 --min-heads 9"),
        ("llama-mha", {"round_mlp": 0}, "--round-mlp 0: give 1 or more"),
    ],
)
def test_impossible_sizes_are_refused(family: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(GispError, match=message):
        uniform_spec(dense(family), ranked(spec_of()), SizeOptions(**options))


def test_specs_that_cannot_be_uniform_are_refused(tmp_path: Path) -> None:
    base = dense("llama-mha")
    with pytest.raises(GispError, match="needs a ranking of 4 layers, the spec has 0"):
        uniform_spec(base, spec_of())
    with pytest.raises(GispError, match="4 different sizes: round them to one"):
        export_uniform(base, spec_of(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_what_was_exchanged(tmp_path: Path) -> None:
    layers = (Kept((0, 1, 2), tuple(range(20))), Kept((0, 1, 2, 3, 4), tuple(range(10)))) * 2
    ranking = (LayerRanking(tuple(range(8)), tuple(range(48))),) * 4
    spec: PrunedSpec = replace(spec_of(layers), ranking=ranking)
    base = dense("llama-mha")
    export_uniform(base, uniform_spec(base, spec, SizeOptions(round_mlp=3)), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "(one size for all layers)",
        "| options | `--round-mlp 3` |",
        "| size of every layer | 4 query heads, 4 key/value heads, 15 MLP channels (LlamaForCausalLM) |",
        "the pruned point of sparsity 0.5000",
        "2 heads and 10 channels of it are gone, 2 heads and 10 channels of the dense model are back",
        "One size costs quality.",
        "| 3 | 4 | 4 | 4 | 15 |",
    ):
        assert part in card, part
    assert "trust_remote_code" not in card


def test_the_card_says_what_was_chosen_without_order(tmp_path: Path) -> None:
    """Layer 0 loses 2 of 6 heads and 14 of 30 channels that were never removed, layer 1 loses 1 channel of 17."""
    layers = (
        Kept(tuple(range(6)), tuple(range(30))),
        Kept((0, 1, 2, 3), tuple(range(17))),
        *(Kept((0, 1, 2), tuple(range(10))),) * 2,
    )
    orders = ((6, 30), (2, 17), (3, 10), (3, 10))
    ranking = tuple(LayerRanking(tuple(range(8)), tuple(range(48)), *tied) for tied in orders)
    base = dense("llama-mha")
    spec = uniform_spec(base, replace(spec_of(layers), ranking=ranking), SizeOptions(round_mlp=16))
    assert {(len(keep.heads), len(keep.channels)) for keep in layers_of(spec)} == {(4, 16)}
    assert "2 heads and 15 channels are gone that the run never removed" in dict(spec.notes)["chosen without any order"]
    ordered = uniform_spec(base, ranked(spec_of(layers)), SizeOptions(round_mlp=16))
    assert "chosen without any order" not in dict(ordered.notes)
