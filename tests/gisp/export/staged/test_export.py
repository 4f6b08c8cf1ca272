"""Exports by several processes: the weights, configuration and card of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from run_cases import OPTIONS
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokens
from torch import distributed

import gisp
from gisp.cli import main
from gisp.export.check import exact_logits
from gisp.export.run import export_run
from gisp.export.staged import export_staged
from gisp.replicas import launch

KINDS = {"plain": "llama-gqa", "tied": "qwen2", "biased": "llama-bias"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every kind of model, and its export by one process."""
    folder = tmp_path_factory.mktemp("runs")
    for name, family in KINDS.items():
        tiny_model(family, layers=5).save_pretrained(folder / f"{name}-model")
        options = {**OPTIONS, "gqa": "query", "keep_minimum": False, "sparsity": 0.6}
        gisp.prune(folder / f"{name}-model", tiny_tokens(16), out=folder / name, **options)
        export_run(folder / name, 0.5, folder / f"{name}-one", device="cpu")
    return folder


def export_all(folder: str, out: str) -> None:
    for name in KINDS:
        done = export_staged(
            f"{folder}/{name}", 0.5, f"{out}/{name}", process_group=distributed.group.WORLD, device="cpu"
        )
        assert done.report.relative_difference <= done.report.tolerance
        with pytest.raises(gisp.GispError, match="is not an empty folder"):
            export_staged(f"{folder}/{name}", 0.5, f"{out}/{name}", process_group=distributed.group.WORLD, device="cpu")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--format", "gguf"], "leave --format gguf out"),
        (["--align-heads", "2", "--round-mlp", "4"], "leave --round-mlp 4, --align-heads 2 out"),
        (["--data", "text.txt"], "leave --data text.txt out"),
        (["--gpus", "3"], "--gpus is 3, --stages 2 starts as many processes"),
        (["--stages", "9"], "--stages 9 is more than the"),
    ],
)
def test_what_an_export_in_stages_does_not_follow_is_named(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    words: str,
) -> None:
    def never(*_: Any, **__: Any) -> int:
        raise AssertionError("started")

    monkeypatch.setattr(launch, "launch", never)
    out = tmp_path / "out"
    assert main(["export", str(runs / "plain"), "--sparsity", "0.5", "--out", str(out), "--stages", "2", *given]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not out.exists()


def test_a_folder_of_several_processes_is_that_of_one(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run_ranks(3, tmp_path / "ranks", export_all, str(runs), str(out))
    for name in KINDS:
        one, split = runs / f"{name}-one", out / name
        expected, found = state(one), state(split)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[tensor], expected[tensor]) for tensor in expected), name
        configs = [json.loads((folder / "config.json").read_text()) for folder in (one, split)]
        assert configs[0] == configs[1]
        index = json.loads((split / "model.safetensors.index.json").read_text())
        assert len({*index["weight_map"].values()}) == len([*split.glob("*.safetensors")]) == 3
        # No process had the layers of another.
        for file in split.glob("*.safetensors"):
            assert len({tensor.split(".")[2] for tensor in load_file(file) if ".layers." in tensor}) <= 2
        logits = [exact_logits(gisp.load(folder), tiny_tokens(2)) for folder in (one, split)]
        assert torch.equal(*logits)
        assert (split / "README.md").read_text().startswith("---")


@pytest.mark.usefixtures("forked_launch")
def test_the_command_starts_the_processes(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["export", str(runs / "plain"), "--sparsity", "0.5", "--device", "cpu", "--stages", "2"]
    out = ["--out", str(tmp_path / "out")]
    assert main([*given, *out, "--format", "gguf"]) == 2
    assert "--stages 2 writes the point of the run as hf" in capfd.readouterr().err
    assert main([*given, *out]) == 0
    assert "(step 3), 21,184 of 33,376 parameters, logits differ by" in capfd.readouterr().out
    assert state(tmp_path / "out").keys() == state(runs / "plain-one").keys()
    assert main([*given, *out]) == 2
    assert "is not an empty folder" in capfd.readouterr().err


def foreign_export(folder: str, out: str) -> None:
    with pytest.raises(gisp.GispError, match="holds other weights by now"):
        export_staged(folder, 0.5, out, process_group=distributed.group.WORLD, device="cpu")


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    gisp.prune(tmp_path / "model", tiny_tokens(16), out=tmp_path / "run", **{**OPTIONS, "sparsity": 0.5})
    tiny_model(seed=5).save_pretrained(tmp_path / "model")
    run_ranks(2, tmp_path / "ranks", foreign_export, str(tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
