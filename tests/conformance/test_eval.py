"""`gisp eval` against an independent perplexity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from . import models, oracle
from .cli import CPU_FLOAT32, run_cli, spawn_cli
from .reading import read_json, read_removal


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    return models.token_ids(rows=5, length=40, seed=55)


@pytest.fixture(scope="module")
def held_out_file(held_out: torch.Tensor, workspace: Path) -> Path:
    return models.save_tokens(workspace / "held-out.safetensors", held_out)


def evaluate(capfd: pytest.CaptureFixture[str], *argv: object) -> dict[str, float]:
    """Run ``gisp eval ... --json``; its standard output must be exactly one JSON object."""
    done = run_cli(capfd, "eval", *argv, *CPU_FLOAT32, "--json")
    assert done.code == 0, done.text
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize("window", [16, 39, 40, 128, 7, 2])
@pytest.mark.parametrize("family", ["llama-mha", "mistral"])
def test_dense_model(
    family: str,
    window: int,
    model_folder: Callable[[str], Path],
    held_out: torch.Tensor,
    held_out_file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Windows dividing the row, leaving a remainder, leaving a single token, and longer than the row."""
    path = model_folder(family)
    result = evaluate(capfd, path, "--data", held_out_file, "--window", window)
    decoder = oracle.Decoder.load(path, torch.float64)
    perplexity, tokens = oracle.perplexity(decoder, held_out, window)
    assert result["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert result["tokens"] == tokens
    assert result["window"] == window
    assert result["sparsity"] == 0


def test_default_window_is_128(
    model_folder: Callable[[str], Path], workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ids = models.token_ids(rows=2, length=200, seed=56)
    data = models.save_tokens(workspace / "long.safetensors", ids)
    path = model_folder("qwen2")
    result = evaluate(capfd, path, "--data", data)
    wanted = oracle.perplexity(oracle.Decoder.load(path, torch.float64), ids, 128)
    assert result["perplexity"] == pytest.approx(wanted[0], rel=1e-5)
    assert (result["tokens"], result["window"]) == (wanted[1], 128)


def test_labels_are_respected(
    model_folder: Callable[[str], Path],
    held_out: torch.Tensor,
    workspace: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Tokens labelled -100 are context only."""
    labels = models.partial_labels(held_out)
    data = models.save_tokens(workspace / "labelled-held-out.safetensors", held_out, labels)
    path = model_folder("llama-gqa")
    result = evaluate(capfd, path, "--data", data, "--window", 16)
    wanted = oracle.perplexity(oracle.Decoder.load(path, torch.float64), held_out, 16, labels)
    assert result["perplexity"] == pytest.approx(wanted[0], rel=1e-5)
    assert result["tokens"] == wanted[1]


@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "qwen2", "qwen3", "llama-bias"])
def test_run_at_a_sparsity(
    family: str,
    preset: str,
    finished_run: Callable[[str, str], Path],
    model_folder: Callable[[str], Path],
    held_out: torch.Tensor,
    held_out_file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = finished_run(family, preset)
    passed = [s["sparsity"] for s in read_json(run)["steps"]]
    for step in (5, len(passed)):
        # A little above the step's own sparsity: the nearest step is still this one.
        asked = passed[step - 1] + 1e-4
        data = ("--data", held_out_file, "--window", 16)
        result = evaluate(capfd, run, "--sparsity", asked, *data)
        decoder = oracle.masked_decoder(model_folder(family), read_removal(run), step)
        perplexity, tokens = oracle.perplexity(decoder, held_out, 16)
        assert result["perplexity"] == pytest.approx(perplexity, rel=1e-5)
        assert result["tokens"] == tokens
        assert result["window"] == 16
        assert result["sparsity"] == pytest.approx(passed[step - 1], rel=1e-9)


def test_json_alone_on_standard_output(
    model_folder: Callable[[str], Path], held_out: torch.Tensor, held_out_file: Path
) -> None:
    """A shell pipeline reads one object: nothing else reaches standard output of a real process."""
    path = model_folder("llama-mha")
    done = spawn_cli("eval", path, "--data", held_out_file, "--window", 16, *CPU_FLOAT32, "--json")
    assert done.code == 0, done.text
    wanted = oracle.perplexity(oracle.Decoder.load(path, torch.float64), held_out, 16)
    assert json.loads(done.stdout)["perplexity"] == pytest.approx(wanted[0], rel=1e-5)
