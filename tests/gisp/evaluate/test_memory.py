"""What a plan counts of an evaluation is no less than what it takes, and not far from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_cases import byte_tokenizer, write_rows
from harness_cases import task_file
from peak import Peak
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from gisp.config.evaluation import EvalOptions, LmEvalTasks
from gisp.evaluate.data import Measure, prepare
from gisp.evaluate.harness import Harness

CPU = torch.device("cpu")
WORDS = "a cab is a big bag of it "


def decoder(vocab_size: int, dtype: torch.dtype = torch.float32, place: str = "cpu") -> Any:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device(place):
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=vocab_size))
    return model.to(dtype).eval()


def text_tokens(root: Path, vocab_size: int) -> Measure:
    save_file({"input_ids": torch.randint(0, vocab_size, (6, 90))}, root / "ids.safetensors")
    options = EvalOptions(window=70, batch_size=5)
    return prepare(str(root / "ids.safetensors"), options, decoder(vocab_size, place="meta"), None)


def choices(root: Path, vocab_size: int) -> Measure:
    rows = [{"context": WORDS * n, "choices": [" " + WORDS, " no"], "answer": 0} for n in (1, 3, 4)]
    return prepare(str(write_rows(root / "rows.jsonl", rows)), EvalOptions(), decoder(vocab_size), str(root))


def completions(root: Path, vocab_size: int) -> Measure:
    rows = [{"prompt": WORDS * n, "completion": " bag"} for n in (1, 9, 8)]
    return prepare(str(write_rows(root / "rows.jsonl", rows)), EvalOptions(), decoder(vocab_size), str(root))


def generated(root: Path, vocab_size: int) -> Measure:
    rows = [{"prompt": WORDS * n, "completion": " bag"} for n in (1, 9, 8)]
    options = EvalOptions(generate=True, max_new_tokens=40)
    found: Any = prepare(str(write_rows(root / "rows.jsonl", rows)), options, decoder(vocab_size), str(root))
    return found.parts[1]


def harness(root: Path, kind: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> Measure:
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    task_file(root / "tasks", f"gisp_{kind}", rows, output_type=kind, **settings)
    return Harness(LmEvalTasks((f"gisp_{kind}",), root / "tasks", batch_size=3), str(root))


def harness_choices(root: Path, vocab_size: int) -> Measure:
    rows = [{"context": WORDS * n, "choices": [" a cab", " no"], "answer": 0} for n in (1, 3, 4)]
    settings = {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "answer"}
    return harness(root, "multiple_choice", settings, rows)


def harness_text(root: Path, vocab_size: int) -> Measure:
    settings = {"doc_to_text": "", "doc_to_target": "text", "metric_list": [{"metric": "word_perplexity"}]}
    return harness(root, "loglikelihood_rolling", settings, [{"text": WORDS * n} for n in (1, 7, 4)])


def harness_generated(root: Path, vocab_size: int) -> Measure:
    settings = {
        "doc_to_text": "prompt",
        "doc_to_target": "completion",
        "generation_kwargs": {"until": ["@"], "max_gen_toks": 40},
        "metric_list": [{"metric": "exact_match"}],
    }
    return harness(root, "generate_until", settings, [{"prompt": WORDS * n, "completion": "x"} for n in (1, 9, 8)])


MEASURES = (text_tokens, choices, completions, generated, harness_choices, harness_text, harness_generated)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(96, torch.float32), (20000, torch.bfloat16)])
@pytest.mark.parametrize("made", MEASURES)
def test_what_is_counted_is_no_less_than_what_is_taken(
    made: Callable[[Path, int], Measure], vocab_size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    measure = made(tmp_path, vocab_size)
    planned = measure.working(decoder(vocab_size, dtype, "meta"), CPU)
    model = decoder(vocab_size, dtype)
    assert measure.working(model, CPU) == planned
    with Peak() as peak:
        measure(model)
    assert 0.4 * planned < peak.most <= planned, peak.most / planned
