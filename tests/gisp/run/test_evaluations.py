"""What evaluations leave in a run folder, and how it is read again."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from gisp.compensation import Compensation, CompensationOptions
from gisp.compensation.acceptance import MethodResult
from gisp.compensation.request import CompensationRequest
from gisp.errors import GispError
from gisp.export.card import quality_table
from gisp.report.evaluations import evaluation_rows
from gisp.run.evaluations import EVALUATIONS, Figure, add_evaluations, read_evaluations

MODEL = "0" * 64


def entry(**changes: Any) -> dict[str, Any]:
    conditions = {"label": "gisp", "fingerprint": MODEL, "step": 3, "sparsity": 0.3, "data": "/x/held.jsonl"}
    measured = {"perplexity": 12.5, "tokens": 1000, "window": 128, "stride": 128}
    return {**conditions, **measured, "protocol": {"dtype": "float32"}, **changes}


def test_data_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    places = [
        "/a/en/held.jsonl",
        "/a/de/held.jsonl",
        "/b/de/held.jsonl",
        "/c/other.jsonl",
        "/c/x",
        "/c/x/",
        "me/held.jsonl",
    ]
    add_evaluations(
        tmp_path,
        [entry(data=data, perplexity=n + 1.0, sparsity=s) for n, data in enumerate(places) for s in (0.0, 0.3)],
    )
    found = read_evaluations(tmp_path, MODEL, {})
    names = ["en/held.jsonl", "a/de/held.jsonl", "b/de/held.jsonl", "other.jsonl"]
    assert [evaluation.source for evaluation in found][:8:2] == names
    assert len({evaluation.source for evaluation in found if evaluation.data in places[:4]}) == 4
    rows = quality_table([evaluation for evaluation in found if evaluation.data in places[:4]])[2:]
    assert len(rows) == 4
    # Beside every figure stands the dense model's on the same data.
    assert all(row.split(" | ")[2] == row.split(" | ")[3] for row in rows)


def test_every_figure_and_condition_comes_back(tmp_path: Path) -> None:
    choices = entry(acc=0.5, acc_stderr=0.1, examples=20, compensation="lsq, damping 0.01 of c.jsonl", stride=64)
    tasks = entry(data=None, lm_eval={"arc": {"alias": None, "acc,none": 0.25, "acc_stderr,none": 0.02}})
    del tasks["perplexity"]
    add_evaluations(tmp_path, [choices])
    add_evaluations(tmp_path, [tasks])
    first, second = read_evaluations(tmp_path, MODEL, {})
    assert first.figures == (Figure("perplexity", 12.5), Figure("acc", 0.5, 0.1))
    assert (first.step, first.tokens, first.examples) == (3, 1000, 20)
    assert (first.source, first.method) == ("held.jsonl", "lsq")
    assert first.conditions == "window 128, stride 64, dtype float32"
    assert Figure("arc acc,none", 0.25, 0.02) in second.figures
    assert second.source == "lm-eval"
    assert ("gisp + lsq", "30.00 %", "acc", "0.5000 ± 0.1000") in [row[:4] for row in evaluation_rows([first])]


@pytest.mark.parametrize("method", ["lsq", "gates", "gates+kfac", "lsq+gates+bias"])
@pytest.mark.parametrize("removed", [True, False])
def test_a_compensation_is_named_by_all_its_stages(method: str, removed: bool, tmp_path: Path) -> None:
    results = [MethodResult(name, 1024, 0.5, 0.4, 0.1, name == "gates") for name in method.split("+")]
    done = Compensation(CompensationOptions(method), (), tuple(results) if removed else (), 8, 512)
    line = CompensationRequest(done.options, "text (gates).jsonl").describe(done)
    add_evaluations(tmp_path, [entry(compensation=line)])
    (found,) = read_evaluations(tmp_path, MODEL, {})
    assert found.method == method and evaluation_rows([found])[0][0] == f"gisp + {method}"


def test_equal_conditions_replace_and_others_add(tmp_path: Path) -> None:
    add_evaluations(tmp_path, [entry()])
    add_evaluations(tmp_path, [entry(perplexity=13.0, versions={"torch": "x"})])
    assert [e.figures[0].value for e in read_evaluations(tmp_path, MODEL, {})] == [13.0]
    others = (
        {"sparsity": 0.4, "step": 4},
        {"label": "one-shot"},
        {"data": "/y/held.jsonl"},
        {"window": 256},
        {"protocol": {"dtype": "bfloat16"}},
        {"compensation": "lsq"},
    )
    for changes in others:
        add_evaluations(tmp_path, [entry(**changes)])
    assert len(read_evaluations(tmp_path, MODEL, {})) == 1 + len(others)


def test_evaluations_that_end_together_all_arrive(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=add_evaluations, args=(tmp_path, [entry(step=step, sparsity=step / 100)]))
        for step in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(e.step or 0 for e in read_evaluations(tmp_path, MODEL, {})) == list(range(24))
    assert [path.name for path in tmp_path.iterdir()] == [EVALUATIONS]


def test_what_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    add_evaluations(tmp_path, [entry(perplexity=math.inf)])
    text = (tmp_path / EVALUATIONS).read_text()
    assert json.loads(text, parse_constant=pytest.fail)[0]["perplexity"] is None
    (evaluation,) = read_evaluations(tmp_path, MODEL, {})
    assert evaluation.figures == (Figure("perplexity", None),)
    assert evaluation_rows([evaluation])[0][3] == "not finite"


@pytest.mark.parametrize(
    "damage, expected",
    [
        ({"label": 5}, "label is 5"),
        ({"sparsity": "0.3"}, "sparsity is '0.3'"),
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"perplexity": "12"}, "perplexity is '12'"),
        ({"perplexity": True}, "perplexity is True"),
        ({"window": -1}, "window is -1"),
        ({"tokens": 1.5}, "tokens is 1.5"),
        ({"data": 7}, "data is 7"),
        ({"protocol": [1]}, r"protocol is \[1\]"),
        ({"lm_eval": [1]}, "corrupt"),
        ({"lm_eval": {"arc": 5}}, "corrupt"),
        ({"fingerprint": "1" * 64}, "evaluations of another base model"),
    ],
)
def test_a_damaged_file_is_one_line_and_stays(tmp_path: Path, damage: dict[str, Any], expected: str) -> None:
    path = tmp_path / EVALUATIONS
    path.write_text(json.dumps([entry(), entry(**damage)]))
    before = path.read_bytes()
    with pytest.raises(GispError, match=expected) as caught:
        read_evaluations(tmp_path, MODEL, {})
    assert str(path) in str(caught.value)
    assert "entry 2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["{", "{}", "[5]", '"x"'])
def test_nothing_is_added_to_a_file_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / EVALUATIONS
    path.write_text(text)
    with pytest.raises(GispError, match=r"evaluations\.json is corrupt"):
        add_evaluations(tmp_path, [entry()])
    assert path.read_text() == text
