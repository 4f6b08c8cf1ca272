"""``gisp eval RUN --stages``: the figures of one process to the bit, and what is refused before a process starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from run_cases import OPTIONS
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens
from torch import distributed

import gisp
from gisp.cli import main
from gisp.config.evaluation import EvalOptions
from gisp.errors import GispError
from gisp.replicas import launch
from gisp.replicas.group import Replicas
from gisp.target import evaluate_along, evaluate_target

POINTS = (0.1, 0.25)
HOW = EvalOptions(window=12, stride=7, batch_size=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a plain model and of a tied one that loses almost all, and data."""
    folder = tmp_path_factory.mktemp("split")
    harsh = {"sparsity": 0.78, "keep_minimum": False, "gqa": "query", "align": 1}
    for name, family, more in (("plain", "llama-gqa", {}), ("tied", "qwen2", harsh)):
        tiny_model(family, layers=5).save_pretrained(folder / f"model-{name}", max_shard_size="40KB")
        gisp.prune(folder / f"model-{name}", tiny_tokens(16), out=folder / name, **{**OPTIONS, **more})
    save_file({"input_ids": tiny_tokens(9, 40, seed=5)}, folder / "data.safetensors")
    return folder


def figures(folder: str, name: str, **how: Any) -> list[dict[str, Any]]:
    given = {"device": "cpu", "options": HOW, **how}
    data, run = f"{folder}/data.safetensors", f"{folder}/{name}"
    along = evaluate_along(run, data, sparsities=POINTS, **given)["points"]
    return [*along, evaluate_target(run, data, **given), evaluate_target(run, data, sparsity=0.0, **given)]


def split(folder: str, out: str) -> None:
    replicas = Replicas(distributed.group.WORLD)
    found = {n: figures(folder, n, replicas=replicas, stages=replicas.size) for n in ("plain", "tied")}
    Path(f"{out}/{replicas.rank}.json").write_text(json.dumps(found))
    model = f"{folder}/model-plain"
    with pytest.raises(GispError, match=f"--stages {replicas.size} takes a run, .*model-plain is none"):
        evaluate_target(model, f"{folder}/data.safetensors", device="cpu", replicas=replicas, stages=replicas.size)


@pytest.mark.parametrize("size", [2, 3])
def test_figures_are_those_of_one_process(place: Path, tmp_path: Path, size: int) -> None:
    expected = {name: figures(str(place), name) for name in ("plain", "tied")}
    assert len({point["perplexity"] for point in expected["plain"]}) >= 3
    run_ranks(size, tmp_path / "ranks", split, str(place), str(tmp_path))
    for rank in range(size):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


@pytest.mark.usefixtures("forked_launch")
def test_the_command_starts_them(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["eval", str(place / "plain"), "--data", str(place / "data.safetensors"), "--device=cpu", "--json"]
    found = []
    for more in ([], ["--stages", "2"]):
        assert main([*given, *more]) == 0
        found.append(json.loads(capfd.readouterr().out))
    assert found[0] == found[1]
    recorded = json.loads((place / "plain" / "evaluations.json").read_text())
    assert recorded


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--stages", "9"], "--stages 9 is more than the 5 layers of this model"),
        (["--stages", "2", "--gpus", "4"], "--gpus is 4, --stages 2 starts as many processes"),
        (["--stages", "2", "--offload"], "--offload needs all of it"),
        (["--stages", "2", "--lm-eval", "piqa"], "--lm-eval needs all of it: give --offload in place of --stages"),
        (
            ["--stages", "2", "--compensate", "lsq", "--calibration", "wikitext2"],
            "--stages 2 splits the model, --compensate lsq needs all of it: give --offload in place of --stages",
        ),
        (["--stages", "2", "--generate"], "--generate needs all of it"),
        (["--stages", "2", "--device", "cuda:1"], "leave --device cuda:1 out"),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], words: str
) -> None:
    def never(*_: Any, **__: Any) -> int:
        raise AssertionError("started")

    monkeypatch.setattr(launch, "launch", never)
    assert main(["eval", str(place / "plain"), "--data", str(place / "data.safetensors"), *given]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert main(["eval", str(place / "model-plain"), "--data", "x.txt", "--stages", "2"]) == 2


def choices(folder: str) -> None:
    replicas = Replicas(distributed.group.WORLD)
    with pytest.raises(GispError, match=r"--stages is for text and tokens, .* holds rows of choices"):
        evaluate_target(f"{folder}/plain", f"{folder}/c.jsonl", device="cpu", replicas=replicas, stages=2)


def test_rows_of_choices_are_refused(place: Path, tmp_path: Path) -> None:
    row = {"context": "a", "choices": ["b", "c"], "answer": 0}
    (place / "c.jsonl").write_text(json.dumps(row))
    run_ranks(2, tmp_path / "ranks", choices, str(place))


def test_several_kinds_of_attention_are_refused() -> None:
    from gisp.evaluate.staged_loss import StagedLoss
    from gisp.stages.placement import Placement

    model = tiny_model()
    model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    stages: Any = type("One", (), {"processes": None, "stage": 0, "count": 1})()
    with pytest.raises(GispError, match="have full_attention and sliding_attention"):
        StagedLoss(model, stages, Placement(1, (0, 4)))
    assert torch.is_grad_enabled()
