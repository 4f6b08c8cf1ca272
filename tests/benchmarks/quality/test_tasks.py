"""Prepared tasks: accuracy is lm-eval's own, with its model class on its definitions; calibration rows are others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality.answers import Extraction, Filter
from benchmarks.quality.prepare import main, prepare, write_definitions
from benchmarks.quality.tasks import PreparedTask, TaskCalibration, TaskMeasures, read_tasks
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.evaluate.pairs import RequestEncoder

CHOICES = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
LIMIT = 4


@pytest.fixture(scope="module")
def model(files: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(files / "model").eval()


@pytest.fixture(scope="module")
def encoder(files: Path) -> RequestEncoder:
    return RequestEncoder(AutoTokenizer.from_pretrained(files / "model"), 2048, 101)


def test_accuracy_is_lm_evals(
    originals: Path, tmp_path: Path, model: Any, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    from gisp.evaluate import LmEvalTasks
    from gisp.evaluate.harness import Harness

    definitions = tmp_path / "definitions"
    names = write_definitions(originals, definitions)
    assert set(names) == {*CHOICES, "gsm8k"}
    tasks = prepare(originals, definitions, names)
    assert {name for name, task in tasks.items() if task.train} == {"gsm8k"}
    encoder = RequestEncoder(AutoTokenizer.from_pretrained(files / "model"), 2048, model.config.vocab_size)
    found = TaskMeasures(tasks, encoder, rows=LIMIT, generated=2, halves=False)(model)
    harness = Harness(LmEvalTasks(tuple(CHOICES), include=definitions, limit=LIMIT), str(files / "model"))
    for name, wanted in harness(model)["lm_eval"].items():
        for metric in ("acc", "acc_norm"):
            if metric in wanted:
                assert found[f"{metric} {name}"] == wanted[metric], (name, metric)
    # Figures that all are 0 or 1 would agree by chance.
    assert any(0 < found[f"acc {name}"] < 1 for name in CHOICES)
    generated = Harness(LmEvalTasks(("gsm8k",), include=definitions, limit=2), str(files / "model"))
    wanted = generated(model)["lm_eval"]["gsm8k"]
    for name in ("strict-match", "flexible-extract"):
        assert found[f"exact_match,{name} gsm8k"] == wanted[f"exact_match,{name}"]
    _gisp_eval_agrees(definitions, files, model)


def _gisp_eval_agrees(definitions: Path, files: Path, model: Any) -> None:
    from gisp.evaluate import EvalOptions, LmEvalTasks
    from gisp.evaluate.data import prepare as prepare_evaluation
    from gisp.evaluate.harness import Harness

    spec = f"lm-eval:hellaswag@{definitions}"
    found = prepare_evaluation(spec, EvalOptions(limit=LIMIT), model, str(files / "model"))(model)
    wanted = Harness(LmEvalTasks(("hellaswag",), include=definitions, limit=LIMIT), str(files / "model"))(model)
    for metric in ("acc", "acc_norm"):
        assert found[metric] == wanted["lm_eval"]["hellaswag"][metric]


def test_generated_answers_count_where_they_are_right(model: Any, files: Path) -> None:
    """A right answer scores 1: what the tiny model says is asked for."""
    from gisp.evaluate.generation import generate_greedily

    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    encoder = RequestEncoder(tokenizer, 2048, model.config.vocab_size)
    prompt = "the cab is"
    said = generate_greedily(model, tokenizer, [encoder.prompt(prompt, "")], max_new_tokens=8)[0]
    how = {
        "until": [],
        "max_new_tokens": 8,
        "filters": [{"name": "all", "regex_pattern": "(?s)(.+)"}],
        "ignore_case": True,
    }
    rows = ({"prompt": prompt, "target": said.strip().upper()}, {"prompt": prompt, "target": "another"})
    found = TaskMeasures({"said": PreparedTask(rows, (), how)}, encoder, rows=1, generated=2, halves=False)(model)
    assert found["acc said"] == found["exact_match,all said"] == 0.5


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("2 and 3 #### 1,234", "1,234", "1,234"),
        ("it is $5. no, 7", "[invalid]", "7"),
        ("none", "[invalid]", "[invalid]"),
        ("#### -3.", "-3.", "-3."),
    ],
)
def test_filters_take_what_lm_evals_take(answer: str, strict: str, flexible: str) -> None:
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    for pattern, select, wanted in (
        (r"#### (\-?[0-9\.\,]+)", 0, strict),
        (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1, flexible),
    ):
        theirs = next(iter(extraction.RegexFilter(pattern, select).apply([[answer]], [{}])))
        assert [Filter("x", pattern, select).apply(answer)] == theirs == [wanted]


def test_both_sides_lose_what_is_ignored() -> None:
    how = Extraction((), 1, [], (",", r"\$", r"(?s).*#### ", r"\.$"), True)
    assert how.plain("so\n#### $1,234.") == "1234" and how.plain("A") == "a"


def test_halves_share_no_row_and_a_training_split_comes_first() -> None:
    rows = tuple({"number": i} for i in range(5))
    halved = PreparedTask(rows)
    assert halved.calibration == rows[:2] and halved.held_out == rows[2:]
    split = PreparedTask(rows, ({"number": 9},))
    assert split.calibration == ({"number": 9},) and split.held_out == rows


def test_a_mixture_has_equal_shares_of_tasks_and_half_of_text(files: Path, encoder: RequestEncoder) -> None:
    tasks = read_tasks(files / "tasks.json.xz")
    ids = torch.arange(20)
    text = Sequences.plain([(ids, ids)] * 3)
    calibration = TaskCalibration({"piqa": tasks["piqa"], "other": tasks["piqa"]}, text, encoder, 64)
    mixed = calibration.sequences(("piqa", "other", "text"), "choice")
    assert [(t.name, t.objective, t.weight, t.examples) for t in mixed.tasks] == [
        ("piqa", "choice", 0.25, 4),
        ("other", "choice", 0.25, 4),
        ("text", "lm", 0.5, 3),
    ]
    assert set(calibration.sequences(("piqa",), "lm").signs) == {1}
    assert len(calibration.sequences(("piqa",), "margin").rows) == 12
    with pytest.raises(GispError, match="boolq is not among"):
        calibration.sequences(("boolq",), "lm")


def test_unreadable_tasks_are_refused(tmp_path: Path, originals: Path) -> None:
    for name, content in (("a.json", b"{}"), ("b.json.xz", b"no"), ("c.json", b'{"format": 9, "tasks": {}}')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(GispError, match=f"{name} holds no prepared tasks"):
            read_tasks(tmp_path / name)
    pytest.importorskip("lm_eval")
    with pytest.raises(GispError, match="no known task"):
        main([str(tmp_path), "--out", str(tmp_path / "out.json")])
