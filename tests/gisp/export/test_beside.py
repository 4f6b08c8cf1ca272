"""What stands beside the weights travels with every export, but no weights and no code; and what loads it then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_models import VOCAB, dense, spec_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from word_tokenizer import CHAT_TEMPLATE, save_tokenizer

import gisp
from gisp.export.beside import copy_beside
from gisp.export.formats.hf import export_hf

TRAVEL = (
    "LICENSE",
    "NOTICE.txt",
    "chat_template.jinja",
    "additional_chat_templates/tool.jinja",
    "vocab.json",
    "a.model",
)
STAY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "optimizer.pt",
    "modeling_own.py",
    "README.md",
    ".gitattributes",
    "original/params.json",
)


def test_all_but_weights_code_and_what_the_exporter_writes(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    for name in (*TRAVEL, *STAY):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    copy_beside(out, None, source)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == set(TRAVEL)
    assert (out / "additional_chat_templates" / "tool.jinja").read_text() == "additional_chat_templates/tool.jinja"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("beside")
    save_tokenizer(root / "base", chat_template=CHAT_TEMPLATE)
    export_hf(dense("llama-gqa"), spec_of(), root / "out", tokenizer_from=root / "base")
    return root / "out"


def test_the_tokenizer_loads_without_asking_to_run_code(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked to run code")

    monkeypatch.setattr("builtins.input", asked)
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=False)
    assert tokenizer("the cat")["input_ids"] == [1, 2]
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_pipeline_generates(export: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=False)
    run = pipeline("text-generation", model=gisp.load(export), tokenizer=tokenizer)
    assert run("the cat", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("the cat")


def test_a_classifier_is_put_on_the_pruned_decoder(export: Path, tmp_path: Path) -> None:
    ids = torch.arange(8)[None] % VOCAB
    model = AutoModelForSequenceClassification.from_pretrained(export, trust_remote_code=True, num_labels=3).eval()
    with torch.no_grad():
        hidden = gisp.load(export).model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model.model(input_ids=ids).last_hidden_state, hidden)
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits, hidden[:, -1] @ model.score.weight.T)
    model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    assert model.score.weight.grad is not None
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, logits)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_peft_finds_all_linear_layers(task: str, export: Path) -> None:
    peft = pytest.importorskip("peft")
    auto = AutoModelForSequenceClassification
    model = gisp.load(export) if task == "CAUSAL_LM" else auto.from_pretrained(export, trust_remote_code=True)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules="all-linear", r=2))
    layers = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert len(layers) == 7 * 4
