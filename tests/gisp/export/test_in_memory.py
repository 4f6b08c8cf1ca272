"""Models pruned in memory, without a run folder: what saves them, and what says so."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

import gisp
from gisp.errors import GispError

PRUNE: dict[str, Any] = {"sparsity": 0.3, "steps": 3, "align": 1, "protect_first": 0, "protect_last": 0}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tiny_tokens()).logits
    return found


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "qwen3"])
def test_the_export_is_the_model_and_leaves_it_as_it_was(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    trajectory = gisp.prune(model, tiny_tokens(), **PRUNE)
    before, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = gisp.export_model(model, tmp_path / "out")
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    for loaded in (remote, gisp.load(tmp_path / "out")):
        torch.testing.assert_close(logits(loaded), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert loaded.config.gisp["sparsity"] == pytest.approx(trajectory.steps[-1].sparsity)
    assert report.path == tmp_path / "out"
    trajectory.at(0.0, model)
    assert model.model.layers[0].mlp.up_proj.out_features == 24


def test_weights_trained_after_pruning_are_exported(tmp_path: Path) -> None:
    model = tiny_model()
    gisp.prune(model, tiny_tokens(), **PRUNE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    before = logits(model)
    gisp.export_model(model, tmp_path / "out", format="masked")
    torch.testing.assert_close(logits(gisp.load(tmp_path / "out")), before, rtol=1e-4, atol=1e-4)


def test_save_pretrained_names_the_call_that_saves(tmp_path: Path) -> None:
    model = tiny_model()
    trajectory = gisp.prune(model, tiny_tokens(), **PRUNE)
    for each in (model, deepcopy(model)):
        with pytest.raises(GispError, match=r"use gisp.export_model\(model, DIR\)"):
            each.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    trajectory.at(0.0, model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(gisp.load(tmp_path / "saved")), logits(tiny_model()))


def test_what_cannot_be_exported_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    with pytest.raises(GispError, match="not pruned: use its own save_pretrained"):
        gisp.export_model(tiny_model(), tmp_path / "out")
    model = tiny_model()
    gisp.prune(model, tiny_tokens(), **PRUNE)
    before = logits(model)
    with pytest.raises(GispError, match="format 'gguf' needs a run folder"):
        gisp.export_model(model, tmp_path / "out", format="gguf")
    (tmp_path / "taken").write_text("")
    with pytest.raises(GispError, match="exists and is not an empty folder"):
        gisp.export_model(model, tmp_path / "taken")
    model.gisp_shrinkable.until_moved(lambda: None)
    with pytest.raises(GispError, match="compensated"):
        gisp.export_model(model, tmp_path / "out")
    assert torch.equal(logits(model), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


@pytest.mark.parametrize("name", ["value_head.weight", "scale"])
def test_parts_of_a_user_s_own_are_named(name: str, tmp_path: Path) -> None:
    model = tiny_model()
    gisp.prune(model, tiny_tokens(), **PRUNE)
    model.value_head = torch.nn.Linear(32, 1, bias=False)
    if name == "scale":
        del model.value_head
        model.register_buffer("scale", torch.ones(1))
    before = logits(model)
    with pytest.raises(GispError, match=f"^{name} is no part of a LlamaForCausalLM, an export cannot hold it"):
        gisp.export_model(model, tmp_path / "out")
    assert torch.equal(logits(model), before)
    assert not (tmp_path / "out").exists()


def test_a_run_of_a_model_in_memory_names_the_ways_there_are(tmp_path: Path) -> None:
    gisp.prune(tiny_model(), tiny_tokens(), out=tmp_path / "run", **PRUNE)
    with pytest.raises(GispError, match=r"gisp.export_model\(model, DIR\) exports it"):
        gisp.export_run(tmp_path / "run", None, tmp_path / "out")
