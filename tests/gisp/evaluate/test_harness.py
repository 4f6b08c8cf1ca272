"""lm-eval tasks on models pruned in memory: its figures are those of ``gisp eval`` on the same rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_cases import byte_tokenizer, greedy, shrunken, write_rows
from harness_cases import CHOICES, CONTEXTS, DELIMITED, METRICS, task_file, write_tasks
from safetensors.torch import save_file

from gisp.cli import main
from gisp.demo import demo_files
from gisp.errors import GispError
from gisp.evaluate import EvalOptions, LmEvalTasks
from gisp.evaluate.data import prepare
from gisp.evaluate.harness import Harness

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    byte_tokenizer().save_pretrained(root / "tokenizer")
    write_tasks(root / "tasks")
    return root


def own(model: Any, places: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    data = write_rows(places / "rows.jsonl", rows)
    return prepare(str(data), EvalOptions(**options), model, str(places / "tokenizer"))(model)


@pytest.mark.parametrize("gqa", [None, "query", "balanced", "group"])
def test_choices(gqa: str | None, places: Path) -> None:
    model = shrunken(gqa, empty_layer=1)
    rows_of = {"gisp_choices": CHOICES, "gisp_contexts": CONTEXTS, "gisp_delimited": DELIMITED}
    tasks = LmEvalTasks(tuple(rows_of), places / "tasks", batch_size=4)
    theirs = Harness(tasks, str(places / "tokenizer"))(model)["lm_eval"]
    for name, rows in rows_of.items():
        ours = own(model, places, rows)
        for metric in METRICS:
            assert theirs[name][metric] == ours[metric]
            assert theirs[name][f"{metric}_stderr"] == pytest.approx(ours[f"{metric}_stderr"])
    assert 0 < theirs["gisp_choices"]["acc"] < 1


def test_no_checkout_is_asked_for(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    Harness(LmEvalTasks(("gisp_choices",), places / "tasks", limit=1), str(places / "tokenizer"))(shrunken(None))
    assert "git" not in capfd.readouterr().err


def test_rows_built_from_a_task_give_its_figures(places: Path) -> None:
    model = shrunken("query", empty_layer=1)
    for name in ("gisp_choices", "gisp_contexts", "gisp_delimited"):
        theirs = Harness(LmEvalTasks((name,), places / "tasks"), str(places / "tokenizer"))(model)["lm_eval"][name]
        spec = f"lm-eval:{name}@{places / 'tasks'}"
        ours = prepare(spec, EvalOptions(), model, str(places / "tokenizer"))(model)
        assert [ours[metric] for metric in METRICS] == [theirs[metric] for metric in METRICS], name


def test_generation(places: Path) -> None:
    model, tokenizer = shrunken("query", empty_layer=0), byte_tokenizer()
    model.generation_config.eos_token_id = 0
    rows = []
    for number, prompt in enumerate(("a cab", "one two three", "x", "bag bag")):
        tokens = greedy(model, tokenizer.encode(prompt), 6)
        answer = tokenizer.decode(tokens[: tokens.index(0)] if 0 in tokens else tokens)
        rows.append({"prompt": prompt, "completion": answer if number else "no such answer"})
    task_file(
        places / "generation",
        "gisp_generation",
        rows,
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="completion",
        generation_kwargs={"until": ["@"], "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match"}],
    )
    tasks = LmEvalTasks(("gisp_generation",), places / "generation", batch_size=3)
    theirs = Harness(tasks, str(places / "tokenizer"))(model)["lm_eval"]["gisp_generation"]
    ours = own(model, places, rows, generate=True, until=("@",), max_new_tokens=6)
    assert theirs["exact_match"] == ours["exact_match"] == 0.75
    assert theirs["exact_match_stderr"] == pytest.approx(ours["exact_match_stderr"])


def test_the_command_line_on_a_run_of_a_trained_decoder(
    places: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files, cpu = demo_files(), ("--device", "cpu", "--dtype", "float32")
    ids = torch.randint(0, 2048, (4, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    run, data = tmp_path / "run", str(write_rows(tmp_path / "rows.jsonl", CHOICES))
    arguments = ["--data", str(tmp_path / "ids.safetensors"), "--out", str(run), "--steps", "3", "--sparsity", "0.4"]
    assert main(["prune", str(files.model), *arguments, *cpu]) == 0
    capfd.readouterr()
    along = ["eval", str(run), "--data", data, "--sparsities", "0.2,0.4", *cpu, "--json"]
    assert main([*along, "--lm-eval", "gisp_choices", "--lm-eval-include", str(places / "tasks")]) == 0
    points = json.loads(capfd.readouterr().out)["points"]
    assert len(points) == 3 and points[0]["sparsity"] == 0
    for point in points:
        theirs = point["lm_eval"]["gisp_choices"]
        assert [theirs[metric] for metric in METRICS] == [point[metric] for metric in METRICS]
        assert math.isfinite(point["perplexity"])


@pytest.mark.parametrize(
    ("names", "include", "message"),
    [
        (("no_such_task",), "tasks", "no task 'no_such_task'"),
        (("gisp_choices", ""), "tasks", "--lm-eval names no task"),
        (("gisp_choices",), "nowhere", "nowhere is no folder"),
    ],
)
def test_tasks_that_are_not_there(names: tuple[str, ...], include: str | None, message: str, places: Path) -> None:
    with pytest.raises(GispError, match=message):
        Harness(LmEvalTasks(names, None if include is None else places / include), str(places / "tokenizer"))


def test_a_task_without_its_data(places: Path, tmp_path: Path) -> None:
    task_file(tmp_path / "tasks", "gisp_lost", CHOICES, output_type="multiple_choice", doc_to_text="context")
    (tmp_path / "tasks" / "gisp_lost.jsonl").unlink()
    harness = Harness(LmEvalTasks(("gisp_lost",), tmp_path / "tasks"), str(places / "tokenizer"))
    with pytest.raises(GispError, match="lm-eval cannot run gisp_lost: "):
        harness(shrunken(None))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a))
    with pytest.raises(GispError, match=r"--lm-eval needs lm-eval: pip install 'gisp\[eval\]'"):
        LmEvalTasks(("arc_easy",))
