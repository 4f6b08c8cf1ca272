"""A tiny decoder with a tokenizer, texts, token files and tasks in the original columns of their data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from eval_cases import byte_tokenizer, write_rows
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens

from benchmarks.quality.tasks import PreparedTask, write_tasks

WORDS = ("cab", "bag", "table", "it", "sun", "stone", "dog", "car", "jar", "lid")


def questions(count: int) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "context": f"the {WORDS[i % len(WORDS)]} is",
            "choices": [" a cab", " the bag of it", " no"],
            "delimiter": " ",
            "answer": i % 3,
        }
        for i in range(count)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    model = tiny_model("llama-gqa", layers=4, intermediate_size=128, max_position_embeddings=2048)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("calibration", 12), ("evaluation", 6)):
        save_file({"input_ids": tiny_tokens(rows, 104, seed=len(name))}, folder / f"{name}.safetensors")
    texts = [f"the {a} saw a {b} and no {c}" for a in WORDS for b in WORDS for c in WORDS[:2]]
    write_rows(folder / "one.jsonl", [{"text": text} for text in texts[:120]])
    write_rows(folder / "two.jsonl", [{"text": text} for text in texts[120:]])
    (folder / "held-out.txt").write_text("\n\n".join(reversed(texts[::3])))
    solutions = tuple({"prompt": f"Question: 1 + {i}?\nAnswer:", "completion": f" {1 + i}"} for i in range(6))
    asked = tuple({"prompt": row["prompt"], "target": row["completion"]} for row in solutions[:2])
    how = {
        "until": ["Question:"],
        "max_new_tokens": 4,
        "filters": [{"name": "strict-match", "regex_pattern": "([0-9]+)"}],
        "ignored": [","],
        "ignore_case": True,
    }
    write_tasks(
        folder / "tasks.json.xz",
        {"piqa": PreparedTask(questions(8)), "gsm8k": PreparedTask(asked, solutions, how)},
    )
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with the columns the data sets are published with."""
    folder = tmp_path_factory.mktemp("originals")
    named = {"text": ["the sun", "a stone", "a dog"], "label": ["A", "B", "C"]}
    rows: dict[str, list[dict[str, Any]]] = {
        "boolq": [{"question": f"is it {w}", "passage": f"the {w} is a {w}.", "answer": i % 2 == 0} for i, w in _all()],
        "piqa": [{"goal": f"open {w}", "sol1": "turn it", "sol2": f"eat the {w}", "label": i % 2} for i, w in _all()],
        "hellaswag": [
            {
                "ctx_a": f"a {w} sits.",
                "ctx_b": "it",
                "activity_label": "Resting",
                "endings": ["stands [title] up", "flies", "sings", f"eats {w}"],
                "label": str(i % 4),
            }
            for i, w in _all()
        ],
        "winogrande": [
            {"sentence": f"the {w} was for _ to hold.", "option1": "ann", "option2": "bob", "answer": str(1 + i % 2)}
            for i, w in _all()
        ],
        "arc_easy": [{"question": f"is a {w}?", "choices": named, "answerKey": "ABC"[i % 3]} for i, w in _all()],
        "arc_challenge": [{"question": f"what {w}?", "choices": named, "answerKey": "CAB"[i % 3]} for i, w in _all()],
        "openbookqa": [{"question_stem": f"a {w} is", "choices": named, "answerKey": "BCA"[i % 3]} for i, w in _all()],
        "gsm8k_test": [{"question": f"1 + {i}?", "answer": f"so {1 + i}\n#### {1 + i}"} for i in range(3)],
        "gsm8k_train": [{"question": f"2 + {i}?", "answer": f"so {2 + i}\n#### {2 + i}"} for i in range(7)],
    }  # fmt: skip
    for name, made in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)))
    return folder


def _all() -> enumerate[str]:
    return enumerate(WORDS[:6])
