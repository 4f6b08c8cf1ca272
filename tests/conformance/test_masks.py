"""Structure for structure: `gisp prune` removes what the masked reference removes, at the same step."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import models, oracle
from .cli import Launcher, must_run, prune_arguments
from .conftest import AMOUNT, RATIO, SPARSITY, STEPS


def assert_same_removals(run: Path, wanted: oracle.Removal, narrow: Callable[[], oracle.Removal] | None = None) -> None:
    """Compare every ``removed_at``.

    A difference is accepted only beside a near tie, that is when ``narrow``, the float32 reference, differs from
    ``wanted``, the float64 reference, as well; and then for at most 0.5 % of the structures.
    """
    tensors = load_file(run / "trajectory.safetensors")
    got, names = [], []
    for kind, rows in (("heads", wanted.heads), ("channels", wanted.channels)):
        for layer in range(len(rows)):
            name = f"layers.{layer}.{kind}.removed_at"
            got += tensors[name].tolist()
            names += [f"{name}[{i}]" for i in range(tensors[name].numel())]
    want = wanted.flat()
    assert len(got) == len(want)
    wrong = [f"{n}: {g}, reference {w}" for n, g, w in zip(names, got, want, strict=True) if g != w]
    near_tie = bool(wrong) and narrow is not None and narrow().flat() != want
    allowed = len(want) // 200 if near_tie else 0
    assert len(wrong) <= allowed, f"{len(wrong)} of {len(want)} differ: {wrong[:12]}"


def assert_same_sparsity(run: Path, wanted: oracle.Removal) -> None:
    steps = json.loads((run / "trajectory.json").read_text())["steps"]
    assert [s["step"] for s in steps] == list(range(1, len(wanted.sparsity) + 1))
    assert [s["sparsity"] for s in steps] == pytest.approx(wanted.sparsity, rel=1e-9)


@pytest.mark.parametrize("preset", AMOUNT)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_removal_matches(
    family: str,
    preset: str,
    finished_run: Callable[[str, str], Path],
    expected: Callable[[str, str], oracle.Removal],
    model_folder: Callable[[str], Path],
    input_ids: torch.Tensor,
) -> None:
    run, wanted = finished_run(family, preset), expected(family, preset)
    amount = float(AMOUNT[preset][1])
    assert_same_removals(
        run,
        wanted,
        lambda: oracle.prune(model_folder(family), preset, input_ids, steps=STEPS, amount=amount, dtype=torch.float32),
    )
    assert_same_sparsity(run, wanted)


def test_a_process_of_its_own_gives_the_same_files(
    finished_run: Callable[[str, str], Path],
    model_folder: Callable[[str], Path],
    tokens: Path,
    launcher: Launcher,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    options = ("--preset", "paper", "--steps", STEPS, "--sparsity", SPARSITY)
    assert launcher.run(*prune_arguments(model_folder("llama-mha"), tokens, out, *options)) == 0, launcher.output()
    name = "trajectory.safetensors"
    inside = finished_run("llama-mha", "paper")
    assert (out / name).read_bytes() == (inside / name).read_bytes()


@pytest.fixture(scope="module")
def expected_by_labels(model_folder: Callable[[str], Path], input_ids: torch.Tensor) -> Callable[[str], oracle.Removal]:
    """What the reference removes from one model by a preset, where labels leave tokens out."""

    @cache
    def compute(preset: str) -> oracle.Removal:
        labels, amount = models.partial_labels(input_ids), float(AMOUNT[preset][1])
        return oracle.prune(model_folder("llama-gqa"), preset, input_ids, labels, steps=STEPS, amount=amount)

    return compute


@pytest.mark.parametrize(("preset", "batch"), [("paper", "1"), ("paper", "5"), ("paper", "auto"), ("official", "5")])
def test_labels_and_any_batch_size(
    preset: str,
    batch: str,
    model_folder: Callable[[str], Path],
    input_ids: torch.Tensor,
    expected: Callable[[str, str], oracle.Removal],
    expected_by_labels: Callable[[str], oracle.Removal],
    tmp_path: Path,
) -> None:
    """Rows with 1 to 30 scored tokens weigh the same, however they are batched."""
    labels = models.partial_labels(input_ids)
    data = models.save_tokens(tmp_path / "labelled.safetensors", input_ids, labels)
    path, run = model_folder("llama-gqa"), tmp_path / "run"
    options = ("--preset", preset, "--steps", STEPS, *AMOUNT[preset], "--batch-size", batch)
    must_run(*prune_arguments(path, data, run, *options))
    wanted = expected_by_labels(preset)
    assert_same_removals(run, wanted)
    assert_same_sparsity(run, wanted)
    assert expected("llama-gqa", preset).flat() != wanted.flat(), "the labels would not have mattered"


def test_samples_takes_the_first_rows(
    model_folder: Callable[[str], Path],
    input_ids: torch.Tensor,
    tokens: Path,
    expected: Callable[[str, str], oracle.Removal],
    tmp_path: Path,
) -> None:
    path, run = model_folder("mistral"), tmp_path / "run"
    options = ("--preset", "paper", "--steps", STEPS, "--sparsity", SPARSITY, "--samples", 5)
    must_run(*prune_arguments(path, tokens, run, *options))
    wanted = oracle.prune(path, "paper", input_ids[:5], steps=STEPS, amount=SPARSITY)
    assert_same_removals(run, wanted)
    assert expected("mistral", "paper").flat() != wanted.flat(), "the number of rows would not have mattered"


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_other_step_counts(
    steps: int,
    model_folder: Callable[[str], Path],
    input_ids: torch.Tensor,
    tokens: Path,
    tmp_path: Path,
) -> None:
    path, run = model_folder("llama-mha"), tmp_path / "run"
    must_run(*prune_arguments(path, tokens, run, "--preset", "paper", "--steps", steps, "--sparsity", 0.3))
    wanted = oracle.prune(path, "paper", input_ids, steps=steps, amount=0.3)
    assert_same_removals(run, wanted)
    assert_same_sparsity(run, wanted)


def test_official_with_another_ratio(
    model_folder: Callable[[str], Path], input_ids: torch.Tensor, tokens: Path, tmp_path: Path
) -> None:
    path, run = model_folder("qwen2"), tmp_path / "run"
    options = ("--preset", "official", "--steps", 5, "--ratio", RATIO / 2)
    must_run(*prune_arguments(path, tokens, run, *options))
    wanted = oracle.prune(path, "official", input_ids, steps=5, amount=RATIO / 2)
    assert_same_removals(run, wanted)
    assert_same_sparsity(run, wanted)
