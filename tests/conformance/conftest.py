"""Shared models, token files and runs of the conformance tests."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from . import models, oracle
from .cli import Launcher, must_run, prune_arguments

STEPS = 9
SPARSITY = 0.45
RATIO = 0.6
AMOUNT = {"paper": ("--sparsity", SPARSITY), "official": ("--ratio", RATIO)}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conformance")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are tiny: threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(workspace: Path) -> Callable[[str], Path]:
    """Folder of a family of :data:`models.FAMILIES`, built once."""

    def build(family: str) -> Path:
        path = workspace / "models" / family
        return path if path.exists() else models.FAMILIES[family](path)

    return build


@pytest.fixture(scope="session")
def input_ids() -> torch.Tensor:
    return models.token_ids()


@pytest.fixture(scope="session")
def tokens(workspace: Path, input_ids: torch.Tensor) -> Path:
    return models.save_tokens(workspace / "tokens.safetensors", input_ids)


@pytest.fixture(scope="session")
def finished_run(workspace: Path, model_folder: Callable[[str], Path], tokens: Path) -> Callable[[str, str], Path]:
    """Run folder of a family and preset on the shared tokens, made once; read it, never change it."""

    def run(family: str, preset: str) -> Path:
        out = workspace / "runs" / f"{family}-{preset}"
        if not out.exists():
            options = ("--preset", preset, "--steps", STEPS, *AMOUNT[preset])
            must_run(*prune_arguments(model_folder(family), tokens, out, *options))
        return out

    return run


@pytest.fixture(scope="session")
def expected(model_folder: Callable[[str], Path], input_ids: torch.Tensor) -> Callable[[str, str], oracle.Removal]:
    """What the float64 reference removes for a family and preset on the shared tokens."""
    known: dict[tuple[str, str], oracle.Removal] = {}

    def compute(family: str, preset: str) -> oracle.Removal:
        if (family, preset) not in known:
            known[family, preset] = oracle.prune(
                model_folder(family), preset, input_ids, steps=STEPS, amount=float(AMOUNT[preset][1])
            )
        return known[family, preset]

    return compute


@pytest.fixture(scope="session")
def launcher(workspace: Path) -> Launcher:
    return Launcher(workspace)
