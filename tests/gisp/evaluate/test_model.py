"""A model in memory has the figures of its run at the same point."""

from __future__ import annotations

from pathlib import Path

import pytest
from eval_cases import byte_tokenizer, write_rows
from run_cases import run_into
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens

from gisp.errors import GispError
from gisp.evaluate import EvalOptions, evaluate_model
from gisp.target import evaluate_target

ROWS = [{"context": f"a {word}", "choices": [" cab", " big bag"], "answer": 0} for word in ("cab", "bag", "tab")]
SIZES = ("sparsity", "model_sparsity", "step", "parameters", "kv_bytes_per_token", "data")


def test_figures_are_those_of_the_run(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    save_file({"input_ids": tiny_tokens(8, 16)}, tmp_path / "tokens.safetensors")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    trajectory = run_into(tmp_path / "run", tmp_path / "model", tmp_path / "tokens.safetensors")
    options = EvalOptions(window=8, limit=3)
    for sparsity in (0.0, 0.2):
        model = trajectory.at(sparsity)
        for data in ("tokens.safetensors", "rows.jsonl"):
            found = evaluate_model(model, tmp_path / data, options=options)
            of_run = evaluate_target(
                tmp_path / "run", tmp_path / data, sparsity=sparsity, options=options, device="cpu", dtype="float32"
            )
            assert of_run["data"] == str(tmp_path / data)
            assert found == {name: value for name, value in of_run.items() if name not in SIZES}
            assert "perplexity" in found and ("acc" in found) == (data == "rows.jsonl")


def test_a_model_made_in_memory_names_its_tokenizer(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = tiny_model()
    with pytest.raises(GispError, match="tokenizer"):
        evaluate_model(model, tmp_path / "rows.jsonl")
    assert evaluate_model(model, tmp_path / "rows.jsonl", tokenizer_from=tmp_path / "tokenizer")["examples"] == 3


def test_what_is_no_model_or_nothing_to_measure_is_refused() -> None:
    for call, line in (
        (lambda: evaluate_model("run", "rows.jsonl"), "model is 'run': give a model"),  # type: ignore[arg-type]
        (lambda: evaluate_model(tiny_model()), "nothing to measure"),
        (lambda: evaluate_target(tiny_model(), "x"), "in memory: gisp.evaluate.evaluate_model"),
    ):
        with pytest.raises(GispError, match=line):
            call()
