"""Nested checkpoints that are cut, corrupt, incomplete or of another model, and loaders that are not meant."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from nested_cases import sound_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import gisp
from gisp.errors import GispError
from gisp.export.nested.files import LAYOUT, RECORD

LAYERS = 4


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound_checkpoint(tmp_path_factory.mktemp("sound") / "nested")


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / RECORD).read_text())
    record.update(changes)
    (folder / RECORD).write_text(json.dumps(record))


def test_missing_and_cut_files_are_refused(copy: Path) -> None:
    weights = copy / "nested-00001.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1000])
    with pytest.raises(GispError, match=r"nested-00001.safetensors has \d+ bytes, not \d+: it is cut off"):
        gisp.load(copy)
    weights.unlink()
    with pytest.raises(GispError, match=r"nested-00001.safetensors is missing: copy the whole folder"):
        gisp.load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "is not gisp-nested version 1 or 2"),
        ({"version": 2}, "it has 0 milestones"),
        ({"format": "other"}, "is not gisp-nested version 1 or 2"),
        ({"steps": []}, "it holds no steps"),
        ({"steps": [{"sparsity": "x", "model_sparsity": 0}]}, "a sparsity is not a number"),
        ({"tensors": {"lm_head.weight": "gone.safetensors"}}, "which files does not name"),
        ({"tensors": {}}, "names no file for model.embed_tokens.weight"),
        ({"files": {}}, "files has no nested-layout.safetensors"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}, LAYOUT: {"bytes": 1, "sha256": ""}}}, "not in the folder"),
        (
            {"base_config": {"model_type": "no_such_model", "num_hidden_layers": LAYERS}},
            "transformers cannot build the model",
        ),
        ({"base_config": 3}, "base_config is not an object"),
    ],
)
def test_a_wrong_record_is_refused(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit(copy, **changes)
    with pytest.raises(GispError, match=message):
        gisp.load(copy)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fingerprint", None, "fingerprint is missing"),
        ("fingerprint", 5, "fingerprint is not a text"),
        ("num_attention_heads", None, "num_attention_heads is missing"),
        ("intermediate_size", "x", "base_model.intermediate_size is 'x'"),
        ("num_key_value_heads", 0, "base_model.num_key_value_heads is 0"),
        ("layers", 10**6, f"base_config has {LAYERS} layers, base_model 1000000"),
        ("layers", 10**30, r"base_model\.layers is 10+"),
    ],
)
def test_a_wrong_base_model_is_refused(copy: Path, name: str, value: Any, message: str) -> None:
    base = json.loads((copy / RECORD).read_text())["base_model"]
    edit(
        copy,
        base_model={key: old for key, old in base.items() if key != name}
        | ({name: value} if value is not None else {}),
    )
    with pytest.raises(GispError, match=message):
        gisp.load(copy)


def test_a_record_that_is_no_json_is_refused(copy: Path) -> None:
    (copy / RECORD).write_text("{")
    with pytest.raises(GispError, match="is corrupt"):
        gisp.load(copy)


def test_weights_of_another_model_are_refused(copy: Path) -> None:
    record = json.loads((copy / RECORD).read_text())
    record["base_config"]["vocab_size"] = 256
    edit(copy, base_config=record["base_config"])
    with pytest.raises(GispError, match=r"embed_tokens.weight is \[128, 64\], its configuration says \[256, 64\]"):
        gisp.load(copy)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prefixes", torch.zeros(3, 4, 3, dtype=torch.int32), "tensor prefixes"),
        ("prefixes", None, "do not fall"),
        ("layers.1.heads", torch.zeros(8, dtype=torch.int32), "layers.1.heads is no order of 8"),
        ("layers.0.kv_of_head", torch.full((8,), 5, dtype=torch.int32), "does not name key/value heads"),
    ],
)
def test_a_wrong_layout_is_refused(copy: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    tensors = load_file(copy / LAYOUT)
    tensors[name] = tensors[name].flip(0).contiguous() if value is None else value
    save_file(tensors, copy / LAYOUT)
    record = json.loads((copy / RECORD).read_text())
    data = (copy / LAYOUT).read_bytes()
    record["files"][LAYOUT] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(copy, files=record["files"])
    with pytest.raises(GispError, match=message):
        gisp.load(copy)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan"), "0.2"])
def test_sparsities_out_of_range_are_refused(sound: Path, sparsity: Any) -> None:
    with pytest.raises(GispError, match="give a value in"):
        gisp.load(sound, sparsity=sparsity)


def test_no_other_loader_takes_the_folder_for_its_model(sound: Path) -> None:
    for loader in (AutoModelForCausalLM, LlamaForCausalLM):
        for ignore in (False, True):
            with pytest.raises((ValueError, OSError, KeyError)):
                loader.from_pretrained(sound, ignore_mismatched_sizes=ignore)
