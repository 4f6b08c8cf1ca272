"""An export that cannot be made leaves nothing behind, and loading refuses what is incomplete or foreign."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import KEPT, Kept, dense, export_one_size, spec_of
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

import gisp
from gisp.errors import GispError
from gisp.export.formats.hf import export_hf
from gisp.export.formats.masked import export_masked
from gisp.export.relayout import LaidOut
from gisp.export.spec import ExportReport

WEIGHTS = "model.safetensors"
Export = Callable[..., ExportReport]


@pytest.mark.parametrize("export", [export_hf, export_masked, export_one_size])
def test_a_taken_place_is_refused(export: Export, tmp_path: Path) -> None:
    taken = tmp_path / "out"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(GispError, match="not an empty folder"):
        export(dense("llama-mha"), spec_of(), taken)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]
    (taken / "notes.txt").unlink()
    export(dense("llama-mha"), spec_of(), taken)
    assert (taken / "config.json").exists()


def test_wrong_logits_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gisp.export.formats import hf

    correct = hf.pruned_state

    def swapped(*args: Any) -> LaidOut:
        state = {**correct(*args)}
        name = "model.layers.0.self_attn.q_proj.weight"
        return LaidOut({**state, name: state[name].roll(1, dims=0)}, {})

    monkeypatch.setattr(hf, "pruned_state", swapped)
    with pytest.raises(GispError, match="logits of the exported model differ by"):
        export_hf(dense("llama-mha"), spec_of(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nan_logits_leave_nothing(tmp_path: Path) -> None:
    base = dense("llama-mha")
    with torch.no_grad():
        base.model.norm.weight.fill_(float("inf"))
    with pytest.raises(GispError, match="NaN or infinite"):
        export_hf(base, spec_of(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("export", [export_hf, export_masked, export_one_size])
def test_a_failing_write_leaves_nothing(export: Export, tmp_path: Path) -> None:
    """The system refuses to let any file grow beyond 8 KiB, in the middle of writing the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    base = dense("llama-mha")
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(GispError, match=r"cannot write .*out"):
            export(base, spec_of(), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# The second is numpy's.
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError("9600 requested and 2928 written")]
)
def test_a_full_disk_is_named(error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gisp.export import folder

    def full(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(GispError, match="the disk is full"):
            export_hf(dense("llama-mha"), spec_of(), tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(GispError, match="free some space"):
        export_hf(dense("llama-mha"), spec_of(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unsupported_models_and_foreign_specs_are_refused(tmp_path: Path) -> None:
    base = dense("llama-mha")
    renamed = deepcopy(base)
    renamed.config.model_type = "internlm3"
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    for model, spec, message in (
        (gpt2, spec_of(), "gpt2"),
        (renamed, spec_of(), "'internlm3' cannot be exported"),
        (base, spec_of(KEPT[:3]), "3 layers, the base 4"),
        (base, spec_of((Kept((0, 8), (0,)), *KEPT[1:])), "kept heads of layer 0"),
        (base, spec_of((KEPT[0], Kept((0,), (3, 2)), *KEPT[2:])), "kept channels of layer 1"),
        (base, spec_of((KEPT[0], Kept((0, 0), (3,)), *KEPT[2:])), "kept heads of layer 1"),
    ):
        with pytest.raises(GispError, match=message):
            export_hf(model, spec, tmp_path / "out")
    zeros: list[dict[str, Any]] = [{"align_heads": 0}, {"min_heads": 0}]
    for options in zeros:
        with pytest.raises(GispError, match="is 0"):
            export_hf(base, spec_of(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_what_it_cannot_trust(tmp_path: Path) -> None:
    with pytest.raises(GispError, match="does not exist"):
        gisp.load(tmp_path / "absent")
    whole = tmp_path / "whole"
    export_hf(dense("llama-mha"), spec_of(), whole)
    state = load_file(whole / WEIGHTS)

    def damaged(name: str, changed: dict[str, torch.Tensor]) -> Path:
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    name = "model.layers.0.mlp.up_proj.weight"
    missing = damaged("missing", {key: value for key, value in state.items() if key != name})
    with pytest.raises(GispError, match="missing keys"):
        gisp.load(missing)
    with pytest.raises(GispError, match=r"mismatched keys.*up_proj"):
        gisp.load(damaged("narrow", {**state, name: state[name][:-1].contiguous()}))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(
        json.dumps({"model_type": "made_up", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    (foreign / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(GispError, match="cannot be loaded"):
        gisp.load(foreign)
    stock = tmp_path / "stock"
    shutil.copytree(whole, stock)
    LlamaConfig(**{**dense("llama-mha").config.to_dict()}).save_pretrained(stock)
    with pytest.raises(GispError, match=r"mismatched keys.*down_proj"):
        gisp.load(stock)
