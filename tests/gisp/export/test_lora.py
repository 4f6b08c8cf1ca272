"""LoRA on pruned exports: adapters train, save and reload, merge into a plain pruned model; the healing example."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from export_models import dense, export_one_size, spec_of
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import gisp
from gisp.data import load_sequences
from gisp.export.formats.hf import export_hf
from gisp.target import evaluate_target

peft = pytest.importorskip("peft")

FORMATS = pytest.mark.parametrize("form", ["hf", "uniform"])
FAMILIES = pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "qwen3"])
EXAMPLE = Path(__file__).parents[3] / "examples" / "heal_lora.py"


@pytest.fixture(scope="module")
def heal_lora() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("heal_lora", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["heal_lora"] = module
    spec.loader.exec_module(module)
    return module


def _export(form: str, family: str, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    {"hf": export_hf, "uniform": export_one_size}[form](dense(family, dtype), spec_of(), out)
    return out


def _text(rows: int = 16) -> torch.Tensor:
    """Rows in which every token follows from the one before: soon learned."""
    start = torch.arange(rows)[:, None] * 7
    return (start + 3 * torch.arange(24)) % 128


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=_text(4)).logits
    return logits


def _shapes(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@FAMILIES
@FORMATS
def test_adapters_train_reload_and_merge(form: str, family: str, tmp_path: Path, heal_lora: ModuleType) -> None:
    folder = _export(form, family, tmp_path / "export")
    model = gisp.load(folder)
    untouched, shapes = _logits(model), _shapes(model)
    data = load_sequences(_text(), vocab_size=128, seq_len=None)
    adapted, losses = heal_lora.train(model, data, steps=30, lr=5e-3, rank=4, batch_size=8, seed=0)
    # ln of the vocabulary is the loss of knowing nothing; random weights are worse.
    assert sum(losses[-5:]) / 5 < math.log(128) < losses[0]
    trained = _logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(gisp.load(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(_logits(again), trained)
    merged = adapted.merge_and_unload()
    # The product of the two factors is added to the weight once instead of applied beside it.
    scale = float(trained.abs().max())
    assert float((_logits(merged) - trained).abs().max()) <= 1e-5 * scale
    assert float((trained - untouched).abs().max()) > 0.1 * scale
    merged.save_pretrained(tmp_path / "merged")
    reloaded = gisp.load(tmp_path / "merged")
    assert type(reloaded) is type(gisp.load(folder))
    assert _shapes(reloaded) == shapes
    assert torch.equal(_logits(reloaded), _logits(merged))


@FORMATS
def test_the_example_heals_an_export(form: str, tmp_path: Path, heal_lora: ModuleType) -> None:
    folder = _export(form, "llama-gqa", tmp_path / "export", torch.bfloat16)
    data = tmp_path / "text.safetensors"
    save_file({"input_ids": _text()}, data)
    arguments = [str(folder), "--data", str(data), "--held-out", str(data), "--out", str(tmp_path / "healed")]
    arguments += ["--steps", "20", "--lr", "5e-3", "--rank", "4", "--batch-tokens", "96", "--seq-len", "24"]
    assert heal_lora.main([*arguments, "--device", "cpu"]) == 0
    before = evaluate_target(str(folder), str(data), window=24, device="cpu")
    after = evaluate_target(str(tmp_path / "healed"), str(data), window=24, device="cpu")
    assert after["perplexity"] < 128 < before["perplexity"]
    assert after["parameters"] == before["parameters"]
    assert after["sparsity"] == before["sparsity"] > 0
    assert gisp.load(tmp_path / "healed").dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "healed", trust_remote_code=form == "hf")
    assert torch.equal(_logits(plain.float()), _logits(gisp.load(tmp_path / "healed").float()))
    card = (tmp_path / "healed" / "README.md").read_text()
    assert "## Healed" in card
    assert "20 steps of 4 x 24 tokens of text.safetensors, LoRA rank 4, lr 0.005; merged." in card
    found = re.search(r"Perplexity ([\d.]+) before, ([\d.]+) after \(368 tokens of text.safetensors, window 24", card)
    assert found is not None
    assert [float(value) for value in found.groups()] == pytest.approx(
        [before["perplexity"], after["perplexity"]], rel=1e-4
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "healed", "text.safetensors"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--out": "{export}"}, "is not an empty folder"),
        ({"--steps": "0"}, "--steps and --rank must be at least 1"),
        ({"--data": "absent.safetensors"}, "absent.safetensors does not exist"),
        ({"--device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_the_example_refuses_bad_input_in_one_line(
    changed: dict[str, str],
    message: str,
    tmp_path: Path,
    heal_lora: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = _export("hf", "llama-mha", tmp_path / "export")
    save_file({"input_ids": _text()}, tmp_path / "text.safetensors")
    options = {"--data": str(tmp_path / "text.safetensors"), "--held-out": str(tmp_path / "text.safetensors")}
    options |= {"--out": str(tmp_path / "healed"), "--steps": "2", "--device": "cpu"}
    options |= {name: value.format(export=folder) for name, value in changed.items()}
    assert heal_lora.main([str(folder), *(part for pair in options.items() for part in pair)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "text.safetensors"]


def test_every_sequence_comes_once_before_any_comes_again(heal_lora: ModuleType) -> None:
    data = load_sequences(_text(rows=6), vocab_size=128, seq_len=None)
    rows = [ids[:, 0].tolist() for ids, _ in heal_lora.batches(data, 4, 6, seed=0)]
    firsts = [first for row in rows for first in row]
    assert [len(row) for row in rows] == [4] * 6
    for epoch in range(4):
        assert sorted(firsts[6 * epoch : 6 * epoch + 6]) == [0, 7, 14, 21, 28, 35]
