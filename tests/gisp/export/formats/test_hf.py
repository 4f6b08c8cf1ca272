"""Exported folders: equal to the masked model, complete, loadable elsewhere, and absent when anything goes wrong."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import (
    CHANNELS,
    FAMILIES,
    HEADS,
    KEPT,
    Kept,
    dense,
    dense_rounded,
    export_one_size,
    layers_of,
    masked,
    spec_of,
    tokens,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import gisp
from gisp.export.formats.hf import export_hf
from gisp.export.formats.masked import export_masked
from gisp.export.modeling_gisp import AUTO_CLASSES
from gisp.export.spec import ExportReport

WEIGHTS = "model.safetensors"
Export = Callable[..., ExportReport]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ExportReport]]:
    """One export of every family beside the inputs and outputs of its independently masked model."""
    root = tmp_path_factory.mktemp("exports")
    reports = {}
    for family in FAMILIES:
        base, spec = dense(family), spec_of()
        reports[family] = export_hf(base, spec, root / family)
        reference, ids = masked(base, spec.keep), tokens()
        with torch.no_grad():
            logits = reference(input_ids=ids).logits
        # Longer than the sliding windows, so that cached steps leave them.
        generated = reference.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
        save_file({"input_ids": ids, "logits": logits, "generated": generated}, root / f"{family}.safetensors")
    return root, reports


@pytest.fixture(scope="module")
def fresh(exported: tuple[Path, dict[str, ExportReport]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without this package got out of the exported folders."""
    home = tmp_path_factory.mktemp("elsewhere")
    script = Path(__file__).parents[3] / "support" / "fresh_reload.py"
    extra = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    done = subprocess.run(
        [sys.executable, "-I", script, exported[0], *extra],
        cwd=home,
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens()).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_without_this_package_can_use_the_export(
    family: str, exported: tuple[Path, dict[str, ExportReport]], fresh: dict[str, Any]
) -> None:
    result = fresh["families"][family]
    scale = float(load_file(exported[0] / f"{family}.safetensors")["logits"].abs().max())
    assert fresh["foreign"] == []
    assert result["module"].startswith("transformers_modules.")
    for what in ("logits", "eager", "sdpa", "round_trip"):
        assert result[what] <= 1e-5 * scale, what
    assert result["generate_dynamic"]
    assert result["generate_static"]
    assert result["checkpointing"] <= 1e-6
    assert result["attention_heads"] == [layer.query_heads for layer in exported[1][family].sizes]
    for saved in ("causal", "decoder"):
        assert result[f"auto_map_{saved}"] == sorted(AUTO_CLASSES)
        assert result[f"decoder_from_{saved}"] == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_classes_fail_loudly(family: str, fresh: dict[str, Any]) -> None:
    """Also with permission to re-initialise what does not fit, which would give random weights."""
    errors = fresh["families"][family]["stock"]
    assert errors == dict.fromkeys(("False", "True"), "AmbiguousGlobalPerLayerAttributeError")


@pytest.mark.parametrize("family", FAMILIES)
def test_gisp_load_gives_the_masked_logits(family: str, exported: tuple[Path, dict[str, ExportReport]]) -> None:
    model = gisp.load(exported[0] / family)
    assert type(model).__module__ == "gisp.export.modeling_gisp"
    assert not model.training
    assert _relative(_logits(model), load_file(exported[0] / f"{family}.safetensors")["logits"]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_report_and_config_tell_what_is_stored(family: str, exported: tuple[Path, dict[str, ExportReport]]) -> None:
    folder, report = exported[0] / family, exported[1][family]
    base, config = dense(family), json.loads((folder / "config.json").read_text())
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    count = sum(torch.Size(shape).numel() for shape in stored.values())
    assert report.parameters_pruned == count < 0.75 * report.parameters_dense
    assert report.parameters_dense == sum(p.numel() for p in base.parameters())
    assert ("lm_head.weight" in stored) != base.config.tie_word_embeddings
    assert report.bytes == (folder / WEIGHTS).stat().st_size
    head_dim = base.model.layers[0].self_attn.head_dim
    assert config["head_dim"] == head_dim
    for index, (layer, keep) in enumerate(zip(report.sizes, KEPT, strict=True)):
        prefix = f"model.layers.{index}"
        assert layer.heads == len(keep.heads)
        assert layer.channels == max(len(keep.channels), 1) == stored[f"{prefix}.mlp.down_proj.weight"][1]
        assert layer.query_heads * head_dim == stored[f"{prefix}.self_attn.o_proj.weight"][1]
        assert layer.kv_heads * head_dim == stored[f"{prefix}.self_attn.k_proj.weight"][0]
    assert report.kv_bytes_per_token == 2 * 4 * head_dim * sum(layer.kv_heads for layer in report.sizes)
    assert config["model_type"] == f"gisp_{base.config.model_type}"
    assert config["gisp"] == {
        "format_version": 1,
        "sparsity": 0.5,
        "model_sparsity": 0.4,
        "step": 17,
        "base_fingerprint": "f" * 64,
    }
    for name in ("rope_parameters", "layer_types", "sliding_window", "tie_word_embeddings", "rms_norm_eps"):
        assert config.get(name) == base.config.to_dict().get(name), name


def test_emptied_layers_hold_zeros_and_output_biases_stay(exported: tuple[Path, dict[str, ExportReport]]) -> None:
    base, state = dense("llama-bias"), load_file(exported[0] / "llama-bias" / WEIGHTS)
    for name in ("q_proj.weight", "k_proj.weight", "v_proj.bias", "q_proj.bias", "o_proj.weight"):
        assert not state[f"model.layers.1.self_attn.{name}"].any(), name
    for name in ("gate_proj.weight", "up_proj.bias", "down_proj.weight"):
        assert not state[f"model.layers.2.mlp.{name}"].any(), name
    for name in ("model.layers.1.self_attn.o_proj.bias", "model.layers.2.mlp.down_proj.bias"):
        assert torch.equal(state[name], base.state_dict()[name])


@pytest.mark.parametrize("family", ["llama-mha", "qwen2"])
@pytest.mark.parametrize("export", [export_hf, export_masked, export_one_size])
def test_the_base_is_left_as_it_was(family: str, export: Export, tmp_path: Path) -> None:
    base = dense(family, torch.bfloat16).train()
    base.set_attn_implementation("eager")
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in base.named_parameters()}
    buffers = {name: b.clone() for name, b in base.named_buffers()}
    export(base, spec_of(), tmp_path / "out")
    for name, parameter in base.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name][1])
    assert all(b.dtype == buffers[name].dtype and torch.equal(b, buffers[name]) for name, b in base.named_buffers())
    assert all(module.training for module in base.modules())
    assert base.config._attn_implementation == "eager"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


@pytest.mark.parametrize("export", [export_hf, export_masked])
def test_bfloat16_stays_and_is_checked_in_float32(export: Export, tmp_path: Path) -> None:
    base = dense("llama-gqa", torch.bfloat16)
    report = export(base, spec_of(), tmp_path / "out")
    assert report.relative_difference <= 1e-5
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    loaded = gisp.load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    wide = gisp.load(tmp_path / "out", dtype=torch.float32)
    assert _relative(_logits(wide), _logits(masked(dense_rounded("llama-gqa"), spec_of().keep))) <= 1e-5


@pytest.mark.parametrize("export", [export_hf, export_masked, export_one_size])
@pytest.mark.parametrize(("said", "shared"), [(True, False), (False, True)])
def test_ties_are_told_as_they_are(export: Export, said: bool, shared: bool, tmp_path: Path) -> None:
    """Merging an adapter of the output embeddings leaves a configuration that says otherwise."""
    base = dense("qwen3", tie_word_embeddings=not said)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) is shared
    base.config.tie_word_embeddings = said
    export(base, spec_of(), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is shared
    assert ("lm_head.weight" in load_file(tmp_path / "out" / WEIGHTS)) is not shared


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_export_is_a_stock_model_with_zeros(family: str, tmp_path: Path) -> None:
    base, spec = dense(family), spec_of()
    report = export_masked(base, spec, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is type(base)
    assert _relative(_logits(model), _logits(masked(base, spec.keep))) <= 1e-5
    assert report.parameters_pruned == report.parameters_dense
    head_dim = base.model.layers[0].self_attn.head_dim
    for layer, keep in zip(model.model.layers, layers_of(spec), strict=True):
        rows = layer.self_attn.q_proj.weight.unflatten(0, (HEADS, head_dim)).abs().sum((1, 2))
        assert set(torch.nonzero(rows).flatten().tolist()) == set(keep.heads)
        channels = layer.mlp.gate_proj.weight.abs().sum(1)
        assert set(torch.nonzero(channels).flatten().tolist()) == set(keep.channels)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No speed-up" in card
    assert "trust_remote_code" not in card


def test_align_and_min_heads_reach_the_export(tmp_path: Path) -> None:
    base, spec = dense("llama-gqa"), spec_of()
    report = export_hf(base, spec, tmp_path / "out", align_heads=4, min_heads=2)
    assert all(layer.query_heads % 4 == 0 for layer in report.sizes)
    assert _relative(_logits(gisp.load(tmp_path / "out")), _logits(masked(base, spec.keep))) <= 1e-5


def test_nothing_removed_is_the_dense_model(tmp_path: Path) -> None:
    base = dense("qwen3")
    spec = spec_of((Kept(tuple(range(HEADS)), tuple(range(CHANNELS))),) * 4)
    report = export_hf(base, spec, tmp_path / "out")
    assert report.parameters_pruned == report.parameters_dense
    assert torch.equal(_logits(gisp.load(tmp_path / "out")), _logits(base))


def test_card(tmp_path: Path) -> None:
    report = export_hf(dense("llama-gqa"), spec_of(), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        'base_model: "some-org/some-model"',
        "trust_remote_code=True",
        "gisp.load(",
        "ignore_mismatched_sizes=True",
        "| preset | paper |",
        "torch 2.9.0",
        "0.5000 (step 17)",
        f"{report.relative_difference:.2e} relative",
        "| 0 | 4 | 6 | 2 | 24 |",
        "| 1 | 0 | 1 | 1 | 4 |",
    ):
        assert part in card, part
    assert str(tmp_path) not in card


def test_tokenizer_and_generation_settings_come_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    source = tmp_path / "base"
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(source)
    (source / "generation_config.json").write_text('{"top_k": 7, "do_sample": true}')
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    export_hf(dense("llama-mha"), spec_of(), tmp_path / "out", tokenizer_from=source)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b c").input_ids == [0, 1, 2]
    assert gisp.load(tmp_path / "out").generation_config.top_k == 7
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_load_opens_plain_folders(tmp_path: Path) -> None:
    base = dense("qwen2", torch.bfloat16)
    base.save_pretrained(tmp_path)
    model = gisp.load(tmp_path)
    assert type(model) is type(base)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_export_can_be_pickled(family: str, exported: tuple[Path, dict[str, ExportReport]]) -> None:
    model = gisp.load(exported[0] / family)
    other = pickle.loads(pickle.dumps(model))
    assert type(other) is type(model)
    assert torch.equal(_logits(other), _logits(model))


@pytest.mark.parametrize("stale", [None, {"AutoModelForCausalLM": "org/name--modeling_gisp.GispQwen2ForCausalLM"}])
def test_saving_points_at_the_copied_code(
    stale: dict[str, str] | None, exported: tuple[Path, dict[str, ExportReport]], tmp_path: Path
) -> None:
    model = gisp.load(exported[0] / "qwen2")
    model.config.auto_map = stale
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_gisp.GispQwen2Config",
        "AutoModel": "modeling_gisp.GispQwen2Model",
        "AutoModelForCausalLM": "modeling_gisp.GispQwen2ForCausalLM",
        "AutoModelForSequenceClassification": "modeling_gisp.GispQwen2ForSequenceClassification",
    }
    source = exported[0] / "qwen2" / "modeling_gisp.py"
    assert (tmp_path / "modeling_gisp.py").read_bytes() == source.read_bytes()


def test_the_plain_class_of_the_family_refuses_the_folder(exported: tuple[Path, dict[str, ExportReport]]) -> None:
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        LlamaForCausalLM.from_pretrained(exported[0] / "llama-mha")


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_export_from_the_gpu(family: str, tmp_path: Path) -> None:
    base = dense(family, torch.bfloat16).to("cuda")
    wanted = _logits(masked(dense_rounded(family), spec_of().keep))
    report = export_hf(base, spec_of(), tmp_path / "out")
    assert report.relative_difference <= 1e-5
    assert all(p.is_cuda and p.dtype == torch.bfloat16 for p in base.parameters())
    assert _relative(_logits(gisp.load(tmp_path / "out", dtype=torch.float32)), wanted) <= 1e-5
