"""Runs that are missing, damaged or belong to another model: exit code 2, one line, nothing written or changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from . import models
from .cli import PAPER, assert_refused, must_run, prune_arguments, run_cli, snapshot


def arguments_of(command: str, run: Path, out: Path, tokens: Path) -> tuple[object, ...]:
    """A complete command line that reads a run."""
    return {
        "export": ("export", run, "--sparsity", 0.2, "--out", out),
        "eval": ("eval", run, "--sparsity", 0.2, "--data", tokens, "--window", 16),
        "report": ("report", run),
        "inspect": ("inspect", run),
    }[command]


READERS = ["export", "eval", "report", "inspect"]


@pytest.mark.parametrize("what", ["missing", "empty-folder", "text-file"])
@pytest.mark.parametrize("command", READERS)
def test_no_run(
    command: str,
    what: str,
    tokens: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name = {"missing": "no-such-run", "empty-folder": "empty-folder", "text-file": "notes.txt"}[what]
    out = tmp_path / "out"
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "notes.txt").write_text("not a run")
    before = snapshot(tmp_path)
    done = run_cli(capfd, *arguments_of(command, tmp_path / name, out, tokens))
    assert_refused(done, name)
    assert not out.exists()
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "no-such-run").exists()


@pytest.fixture(scope="module")
def own_base_run(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> tuple[Path, Path]:
    """A run and its base model, both private to this module."""
    folder = tmp_path_factory.mktemp("own-base")
    model, run = models.llama_mha(folder / "model"), folder / "run"
    must_run(*prune_arguments(model, tokens, run, *PAPER))
    return model, run


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _noise(path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    path.write_bytes(bytes(torch.randint(0, 256, (2000,), generator=generator).tolist()))


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _impossible_step(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.1.channels.removed_at"][4] = 1000


def _negative_step(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.1.heads.removed_at"][0] = -1


def _drop_layer(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["layers.2.heads.removed_at"]


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    name = "layers.0.channels.removed_at"
    tensors[name] = tensors[name][:-1].clone()


def _floats(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].float()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut-tensors": lambda run: _cut(run / "trajectory.safetensors"),
    "noise-tensors": lambda run: _noise(run / "trajectory.safetensors"),
    "no-tensors": lambda run: (run / "trajectory.safetensors").unlink(),
    "cut-json": lambda run: _cut(run / "trajectory.json"),
    "noise-json": lambda run: _noise(run / "trajectory.json"),
    "list-json": lambda run: _write(run / "trajectory.json", "[]"),
    "empty-json": lambda run: _write(run / "trajectory.json", "{}"),
    "no-json": lambda run: (run / "trajectory.json").unlink(),
    "impossible-step": lambda run: _edit(run / "trajectory.safetensors", _impossible_step),
    "negative-step": lambda run: _edit(run / "trajectory.safetensors", _negative_step),
    "missing-tensor": lambda run: _edit(run / "trajectory.safetensors", _drop_layer),
    "wrong-width": lambda run: _edit(run / "trajectory.safetensors", _narrow),
    "float-tensors": lambda run: _edit(run / "trajectory.safetensors", _floats),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", READERS)
def test_corrupt_trajectory(
    command: str,
    damage: str,
    own_base_run: tuple[Path, Path],
    tokens: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, out = tmp_path / "damaged", tmp_path / "out"
    shutil.copytree(own_base_run[1], run)
    DAMAGE[damage](run)
    before = snapshot(run)
    assert_refused(run_cli(capfd, *arguments_of(command, run, out, tokens)))
    assert not out.exists()
    assert snapshot(run) == before


@pytest.mark.parametrize("command", ["export", "eval"])
@pytest.mark.parametrize("fate", ["other-weights", "other-shape", "gone"])
def test_foreign_base_model(
    command: str, fate: str, tokens: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The base model was exchanged or deleted after the run."""
    model, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "out"
    models.llama_mha(model)
    must_run(*prune_arguments(model, tokens, run, *PAPER))
    shutil.rmtree(model)
    if fate == "other-weights":
        models.llama_mha(model, seed=77)
    elif fate == "other-shape":
        models.llama_gqa(model)
    before = snapshot(tmp_path)
    assert_refused(run_cli(capfd, *arguments_of(command, run, out, tokens)), str(model))
    assert not out.exists()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", READERS)
def test_tensors_of_another_run(
    command: str,
    own_base_run: tuple[Path, Path],
    finished_run: Callable[[str, str], Path],
    tokens: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, out, name = tmp_path / "mixed", tmp_path / "out", "trajectory.safetensors"
    shutil.copytree(own_base_run[1], run)
    shutil.copy(finished_run("llama-gqa", "paper") / name, run / name)
    before = snapshot(run)
    assert_refused(run_cli(capfd, *arguments_of(command, run, out, tokens)))
    assert not out.exists()
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "change",
    [("--format", "pickle"), ("--sparsity", "1.5"), ("--sparsity", "-0.2"), ("--sparsity", "nan")],
    ids=lambda change: f"{change[0][2:]}={change[1]}",
)
def test_bad_export_option(
    change: tuple[str, str],
    own_base_run: tuple[Path, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    start = ("export", own_base_run[1], "--sparsity", 0.2, "--out", out)
    assert_refused(run_cli(capfd, *start, f"{change[0]}={change[1]}"), change[1])
    assert not out.exists()


def test_export_leaves_an_occupied_folder_alone(
    own_base_run: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    before = snapshot(out)
    done = run_cli(capfd, "export", own_base_run[1], "--sparsity", 0.2, "--out", out)
    assert_refused(done, "precious")
    assert snapshot(out) == before
