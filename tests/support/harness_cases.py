"""Tasks of lm-eval on local rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval_cases import write_rows

CHOICES = [
    {
        "context": f"{subject} {verb}{' ' * (number % 2)}",
        "choices": [f"{'' if number % 2 else ' '}{end}" for end in ("a cab", "the big bag of it", "é", "no", "ab ab")],
        "answer": number % 5,
    }
    for number, (subject, verb) in enumerate(
        (s, v) for s in ("the cab", "a bag", "it", "12 cabs", "") for v in ("saw", "is not", "was a")
    )
]
CONTEXTS = [
    {"contexts": [f"{word} {number}", f"no {word}"], "continuation": f" was {word}", "answer": number % 2}
    for number, word in enumerate(("cab", "bag", "table", "é", "abab"))
]
DELIMITED = [
    {
        "context": f"{word} is",
        "bare": ["a cab", "the bag of it", "é", "no"],
        "choices": [" a cab", " the bag of it", " é", " no"],
        "delimiter": " ",
        "answer": number % 4,
    }
    for number, word in enumerate(("cab", "bag", "table", "it", "x", "12", "ab"))
]
METRICS = ("acc", "acc_norm", "acc_bytes")


def task_file(folder: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """A task of lm-eval on local rows; JSON is YAML."""
    folder.mkdir(exist_ok=True)
    data = write_rows(folder / f"{name}.jsonl", rows)
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "target_delimiter": "",
    }
    (folder / f"{name}.yaml").write_text(json.dumps({**common, **settings}))


def write_tasks(folder: Path) -> None:
    metrics = {"output_type": "multiple_choice", "metric_list": [{"metric": name} for name in METRICS]}
    task_file(
        folder,
        "gisp_choices",
        CHOICES,
        doc_to_text="context",
        doc_to_choice="choices",
        doc_to_target="answer",
        **metrics,
    )
    task_file(
        folder,
        "gisp_delimited",
        DELIMITED,
        doc_to_text="context",
        doc_to_choice="bare",
        doc_to_target="answer",
        target_delimiter=" ",
        **metrics,
    )
    task_file(
        folder,
        "gisp_contexts",
        CONTEXTS,
        doc_to_text="answer",
        doc_to_choice="contexts",
        doc_to_target="continuation",
        **metrics,
    )
