"""Weight-only quantisation of pruned exports with torchao, in memory and through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import dense, export_one_size, ranked, spec_of, tokens
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

import gisp
from gisp.export.formats.hf import export_hf
from gisp.export.load import register_models
from gisp.export.sizes.rounding import round_mlp
from gisp.model.structures import map_model

torchao = pytest.importorskip("torchao.quantization")

GROUP = 16
FAMILIES = pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-bias", "qwen3"])
BITS = pytest.mark.parametrize("bits", [8, 4])


def config(bits: int) -> Any:
    """Eight bits: one scale per row; four bits: one per ``GROUP`` weights of a row."""
    if bits == 8:
        return torchao.Int8WeightOnlyConfig()
    int4: torch.dtype = torch.int4  # type: ignore[attr-defined]
    return torchao.IntxWeightOnlyConfig(weight_dtype=int4, granularity=torchao.PerGroup(GROUP))


def export(family: str, out: Path) -> Path:
    """A pruned export whose widths are multiples of ``GROUP``."""
    base = dense(family)
    export_hf(base, round_mlp(map_model(base), ranked(spec_of()), GROUP), out, align_heads=2)
    return out


def linears(model: Any) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens()).logits
    return result


@BITS
@FAMILIES
def test_quantised_layers_compute_with_their_rounded_weights(bits: int, family: str, tmp_path: Path) -> None:
    folder = export(family, tmp_path / "out")
    model, rounded = gisp.load(folder), gisp.load(folder)
    plain = logits(model)
    torchao.quantize_(model, config(bits))
    originals = linears(rounded)
    for name, layer in linears(model).items():
        weight = originals[name].weight.detach()
        assert type(layer.weight) is not nn.Parameter
        stored = layer.weight.dequantize()
        groups = weight.unflatten(1, (-1, GROUP if bits == 4 else weight.shape[1]))
        # Symmetric rounding is off by half a step at most; a step is the largest weight over 7 or 127 (or 7.5, 127.5).
        step = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
        off = (stored - weight).unflatten(1, groups.shape[1:]).abs()
        assert bool((off <= step * 1.001).all()), name
        originals[name].weight = nn.Parameter(stored, requires_grad=False)
    wanted = logits(rounded)
    # int8 products scale after summing, not before: another order of float32 operations.
    assert float((logits(model) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert not torch.equal(wanted, plain)


@BITS
def test_transformers_quantise_save_and_reload(bits: int, tmp_path: Path) -> None:
    folder = export("llama-gqa", tmp_path / "out")
    register_models()
    options = {"quantization_config": TorchAoConfig(config(bits)), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    reference = gisp.load(folder)
    torchao.quantize_(reference, config(bits), filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
    assert torch.equal(logits(model), logits(reference))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(gisp.errors.GispError, match="is quantised"):
        gisp.load(tmp_path / "saved")


def test_uniform_exports_quantise_as_stock_models(tmp_path: Path) -> None:
    export_one_size(dense("llama-gqa"), spec_of(), tmp_path / "out")
    options = {"quantization_config": TorchAoConfig(config(8)), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    reference = gisp.load(tmp_path / "out")
    torchao.quantize_(reference, config(8), filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
    assert torch.equal(logits(model), logits(reference))


def test_groups_need_widths_that_are_multiples(tmp_path: Path) -> None:
    """Why exports have --round-mlp: a width of 43 has no whole groups of 16."""
    base = dense("llama-mha")
    export_hf(base, spec_of(), tmp_path / "out")
    with pytest.raises((AssertionError, ValueError)):
        torchao.quantize_(gisp.load(tmp_path / "out"), config(4))
