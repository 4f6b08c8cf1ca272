"""Rows of lm-eval tasks: lm-eval's own definitions over local data, compared with lm-eval's own requests."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from gisp.data import load_sequences, read_rows
from gisp.data.lm_eval_tasks import NAMED_TASKS
from gisp.errors import GispError

datasets = pytest.importorskip("datasets")
lm_eval = pytest.importorskip("lm_eval")

SCIENCE = {"text": ["the sun", "a stone", "a dog"], "label": ["A", "B", "C"]}
# Definition file and one document a split, as the hub's data set holds it.
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "boolq": (
        "super_glue/boolq/default.yaml",
        {"passage": "The sun is a star.", "question": "is the sun a star", "label": 1},
    ),
    "piqa": ("piqa/piqa.yaml", {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "turn the jar", "label": 0}),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        {
            "ctx_a": "A man sits.",
            "ctx_b": "he",
            "activity_label": "Resting",
            "endings": ["stands [title] up", "flies", "sings", "melts"],
            "label": "2",
        },
    ),
    "winogrande": (
        "winogrande/default.yaml",
        {"sentence": "The cup was too big for _ to hold.", "option1": "Ann", "option2": "Bob", "answer": "2"},
    ),
    "arc_easy": ("arc/arc_easy.yaml", {"question": "What shines?", "choices": SCIENCE, "answerKey": "A"}),
    "arc_challenge": ("arc/arc_challenge.yaml", {"question": "What barks?", "choices": SCIENCE, "answerKey": "C"}),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        {"question_stem": "What lies still?", "choices": SCIENCE, "answerKey": "B"},
    ),
    "gsm8k": ("gsm8k/gsm8k.yaml", {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}),
    "medqa_4options": (
        "medqa/medqa.yaml",
        {"sent1": "Which one?", "ending0": "w", "ending1": "x", "ending2": "y", "ending3": "z", "label": 3},
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def task_folder(folder: Path, names: list[str], splits: tuple[str, ...] = ("train", "validation", "test")) -> Path:
    """lm-eval's task files, each with its data replaced by local json files."""
    folder.mkdir(exist_ok=True)
    for name in names:
        definition, doc = TASKS[name]
        files = {}
        for split in splits:
            files[split] = str(folder / f"{name}-{split}.json")
            Path(files[split]).write_text(json.dumps(doc))
        source = Path(lm_eval.__file__).parent / "tasks" / definition
        lines = [
            f"include: {source}",
            f"task: {name}",
            "dataset_path: json",
            "dataset_name: null",
            f"dataset_kwargs: {json.dumps({'data_files': files})}",
        ]
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_what_lm_eval_asks(name, tmp_path):
    folder = task_folder(tmp_path / "tasks", [name])
    rows = list(read_rows(f"lm-eval:{name}@{folder}"))
    assert len(rows) == 1 and rows[0]["task"] == name
    row = rows[0]
    task = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False).load([name])["tasks"][name]
    doc = next(iter(task.training_docs()))
    context = task.fewshot_context(doc, 0)
    requests = task.construct_requests(doc, context)
    if name == "gsm8k":
        assert row["prompt"] == context == "Question: What is 1 + 1?\nAnswer:"
        assert row["completion"] == " 1 + 1 = 2\n#### 2"
        return
    contexts = row.get("contexts") or [row["context"]] * len(row["choices"])
    assert list(zip(contexts, row["choices"], strict=True)) == [request.args for request in requests]
    # lm-eval scores by its own reading of the gold answer: certainty of our answer must count as right.
    lls = [(0.0, True) if i == row["answer"] else (-9.0, False) for i in range(len(row["choices"]))]
    assert task.process_results(doc, lls)["acc"] == 1.0


def test_winogrande_scores_one_continuation_in_two_contexts(tmp_path):
    folder = task_folder(tmp_path / "tasks", ["winogrande"])
    assert list(read_rows(f"lm-eval:winogrande@{folder}")) == [
        {
            "task": "winogrande",
            "contexts": ["The cup was too big for Ann", "The cup was too big for Bob"],
            "choices": [" to hold.", " to hold."],
            "answer": 1,
        }
    ]


def test_several_tasks_take_turns_and_name_themselves(tmp_path):
    folder = task_folder(tmp_path / "tasks", ["piqa", "boolq"])
    more = [TASKS["piqa"][1] | {"goal": goal} for goal in ("one", "two")]
    (folder / "piqa-train.json").write_text("\n".join(map(json.dumps, more)))
    rows = list(read_rows(f"lm-eval:piqa,boolq@{folder}"))
    assert [row["task"] for row in rows] == ["piqa", "boolq", "piqa"]
    assert [row["context"].split("\n")[0] for row in rows[::2]] == ["Question: one", "Question: two"]


def test_splits(tmp_path, caplog):
    folder = task_folder(tmp_path / "tasks", ["arc_easy"])
    for split in ("train", "validation", "test"):
        doc = TASKS["arc_easy"][1] | {"question": split}
        (folder / f"arc_easy-{split}.json").write_text(json.dumps(doc))
    spec = f"lm-eval:arc_easy@{folder}"
    assert next(iter(read_rows(spec)))["context"].startswith("Question: train")
    assert next(iter(read_rows(spec, held_out=True)))["context"].startswith("Question: test")
    assert not caplog.records
    with (folder / "arc_easy.yaml").open("a") as file:
        file.write("training_split: null\n")
    with caplog.at_level(logging.WARNING):
        assert next(iter(read_rows(spec)))["context"].startswith("Question: validation")
    assert "arc_easy has no training split: its validation split is taken" in caplog.text


def test_the_seven_tasks_are_lm_evals_own():
    # An index of all of lm-eval takes many seconds; the definition files say the same.
    assert len(set(NAMED_TASKS["commonsense"])) == 7
    for name in NAMED_TASKS["commonsense"]:
        definition = Path(lm_eval.__file__).parent / "tasks" / TASKS[name][0]
        assert f"task: {name}" in definition.read_text().splitlines()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lm-eval:", "names no task"),
        ("lm-eval:piqa,@x", "names no task"),
        ("lm-eval:piqa@{folder}/missing", "missing is not a folder"),
        ("lm-eval:nothing@{folder}", "lm-eval has no task 'nothing' in"),
        ("lm-eval:boolq@{folder}", "lm-eval task boolq cannot be loaded"),
        ("lm-eval:piqa@{folder}", "task piqa: document 0 gives no row: answer 5 is none of 2 choices"),
    ],
)
def test_bad_tasks_end_in_one_line(spec, message, tmp_path):
    folder = task_folder(tmp_path / "tasks", ["piqa", "boolq"])
    (folder / "piqa-train.json").write_text(json.dumps(TASKS["piqa"][1] | {"label": 5}))
    (folder / "boolq-train.json").unlink()
    with pytest.raises(GispError, match=message) as caught:
        list(read_rows(spec.format(folder=folder)))
    assert "\n" not in str(caught.value)


def test_rows_become_signed_sequences(tmp_path):
    from word_tokenizer import save_tokenizer

    words = ("<end>", "The", "cup", "was", "too", "big", "for", "Ann", "Bob", "to", "hold", ".")
    tokenizer = save_tokenizer(tmp_path / "model", words)
    folder = task_folder(tmp_path / "tasks", ["winogrande"])
    found = load_sequences(
        f"lm-eval:winogrande@{folder}", vocab_size=12, seq_len=32, tokenizer_from=tokenizer, objective="margin"
    )
    shared = [1, 2, 3, 4, 5, 6]
    assert [ids.tolist() for ids, _ in found.rows] == [[*shared, name, 9, 10, 11] for name in (7, 8)]
    assert all(labels.tolist() == [-100] * 7 + [9, 10, 11] for _, labels in found.rows)
    assert found.signs == (-1, 1) and found.examples == ((0, 1),)
    assert found.kinds == ("winogrande",)


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(GispError, match=r"^lm-eval:piqa needs lm-eval: pip install 'gisp\[eval\]'$"):
        list(read_rows("lm-eval:piqa"))
