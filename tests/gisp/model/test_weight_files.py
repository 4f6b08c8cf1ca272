"""Quantised weights are refused whatever announces them, and nothing of a checkpoint is dropped without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

import gisp
from gisp.errors import GispError

UP = "model.layers.0.mlp.up_proj"
Change = Callable[[dict[str, torch.Tensor]], None]


def folder(place: Path, change: Change) -> Path:
    tiny_model().save_pretrained(place)
    state = load_file(place / "model.safetensors")
    change(state)
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    return place


def as_dtype(dtype: torch.dtype) -> Change:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[f"{UP}.weight"] = (state[f"{UP}.weight"] * 100).to(dtype)

    return change


def beside(name: str) -> Change:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[f"{UP}.{name}"] = torch.ones(3)

    return change


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float8_e4m3fn])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(GispError, match=rf"is quantised \({UP}.weight is \w+\): give its unquantised weights"):
        gisp.load(folder(tmp_path, as_dtype(dtype)))


@pytest.mark.parametrize(
    "name",
    ["weight_scale", "weight_scale_inv", "weight_zero_point", "scales", "qzeros", "g_idx", "weight.absmax", "SCB"],
)
def test_tensors_of_quantisers(name: str, tmp_path: Path) -> None:
    with pytest.raises(GispError, match=rf"is quantised \({UP}.{name} is F32\)"):
        gisp.load(folder(tmp_path, beside(name)))


def test_shards_and_pickled_weights_are_read_too(tmp_path: Path) -> None:
    place = folder(tmp_path, as_dtype(torch.int8))
    (place / "model.safetensors").rename(place / "model-00001-of-00001.safetensors")
    names = load_file(place / "model-00001-of-00001.safetensors")
    index: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(GispError, match=r"up_proj.weight is I8"):
        gisp.load(place)
    (place / "model.safetensors.index.json").unlink()
    torch.save(names, place / "pytorch_model.bin")
    with pytest.raises(GispError, match=r"up_proj.weight is int8"):
        gisp.load(place)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_side_files(name: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(GispError, match=rf"is quantised \(it has {name}\)"):
        gisp.load(tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        {"quantization_config": {"quant_method": "awq"}},
        {"compression_config": {"quant_method": "awq"}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    ],
)
def test_configurations(extra: dict[str, Any], tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | extra))
    with pytest.raises(GispError, match=r"is quantised \(awq\)"):
        gisp.load(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.lora_A.weight", "model.adapter.weight", f"{UP}.bias"])
def test_tensors_without_a_place_are_refused(name: str, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[name] = torch.ones(24)

    with pytest.raises(GispError, match=f"unexpected keys, first {name}"):
        gisp.load(folder(tmp_path, change))


def test_buffers_of_older_checkpoints_and_float64_are_no_quantisation(tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        state[f"{UP}.weight"] = state[f"{UP}.weight"].double()

    model = gisp.load(folder(tmp_path, change), dtype=torch.float32)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, tiny_model().model.layers[0].mlp.up_proj.weight)
