"""Runs of a split model: what they write is what one process writes, for any stages and replicas of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from run_cases import OPTIONS, cut_after
from run_files import written
from tiny import tiny_model, tiny_tokens
from torch import distributed

import gisp
from gisp.data import Sequences
from gisp.model.load import load_dense
from gisp.model.structures import fingerprint_parts
from gisp.run import loop
from gisp.stages import moves, placement
from gisp.stages.placement import LayerCosts, Placement

# Batches that do not fall into slices evenly, of sequences of many lengths.
CASES: dict[str, dict[str, Any]] = {
    "stream": {"batch_tokens": 170},
    "exact": {"engine": "exact", "batch_tokens": None, "batch_size": 2, "first_order": "plain"},
    "few": {"batch_tokens": 40, "ema": 0.5},
    "heads": {"batch_tokens": 170, "gqa": "query", "keep_minimum": False, "sparsity": 0.7},
    "tied": {"batch_tokens": 170},
    "shielded": {"batch_tokens": 170, "protect_first": 0.7, "sparsity": 0.1},
}


def texts() -> Sequences:
    tokens = tiny_tokens(24, 16)
    return Sequences.plain([(row[: 5 + i % 11], row[: 5 + i % 11]) for i, row in enumerate(tokens)])


def prune(folder: str, case: str, out: str, **more: Any) -> gisp.Trajectory:
    model = f"{folder}/models/{'tied' if case == 'tied' else 'plain'}"
    return gisp.prune(model, texts(), out=out, **{**OPTIONS, **CASES[case], **more})


def prune_all(folder: str, out: str, stages: int) -> None:
    """Every case, in the processes of one group."""
    for case in CASES:
        prune(folder, case, f"{out}/{case}", process_group=distributed.group.WORLD, stages=stages)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of five layers, and all cases in one process that has been given as many slices."""
    folder = tmp_path_factory.mktemp("alone")
    tiny_model("llama-gqa", layers=5).save_pretrained(folder / "models" / "plain", max_shard_size="40KB")
    tiny_model("qwen2", layers=5).save_pretrained(folder / "models" / "tied")
    for case in CASES:
        prune(str(folder), case, str(folder / case), slices=8)
    return folder


@pytest.mark.parametrize(("size", "stages"), [(2, 2), (4, 4), (4, 2)])
def test_stages_and_replicas_change_nothing(size: int, stages: int, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    run_ranks(size, tmp_path / "ranks", prune_all, str(alone), str(folder), stages)
    for case in CASES:
        assert written(folder / case) == written(alone / case), case


def cut_run(folder: str, out: str, stages: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(folder, "stream", out, process_group=distributed.group.WORLD, stages=stages, on_step=cut_after(2))


def resumed_run(folder: str, out: str, stages: int) -> None:
    trajectory = prune(folder, "stream", out, process_group=distributed.group.WORLD, stages=stages, resume=True)
    assert len(trajectory.steps) == OPTIONS["steps"]


def test_another_number_of_stages_takes_a_run_up(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_ranks(2, tmp_path / "two", cut_run, str(alone), str(out), 2)
    assert len(gisp.Trajectory.load(out).steps) == 2
    run_ranks(3, tmp_path / "three", resumed_run, str(alone), str(out), 3)
    assert written(out) == written(alone / "stream")
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        prune(str(alone), "stream", str(other), slices=8, on_step=cut_after(1))
    run_ranks(4, tmp_path / "again", resumed_run, str(alone), str(other), 2)
    assert written(other) == written(alone / "stream")


def moving_run(folder: str, out: str, stages: int) -> None:
    """A run whose borders move after every step, as far as they can."""
    moved: list[Placement] = []

    def shifted(costs: LayerCosts, now: Placement, tokens: Sequence[int]) -> Placement:
        layers, first = now.bounds[-1], len(moved) % 2 == 0
        moved.append(now)
        inner = range(1, len(now.bounds) - 1)
        return Placement(now.stages, (0, *(i if first else layers - len(inner) - 1 + i for i in inner), layers))

    moves.EVERY, moves.replaced, loop.EVERY = 1, shifted, 1
    placement.MOST_CHUNKS = 1
    for case in ("stream", "heads", "tied"):
        trajectory = prune(
            folder, case, f"{out}/{case}", process_group=distributed.group.WORLD, stages=stages, on_step=None
        )
        assert len(moved) >= OPTIONS["steps"] and len({now.bounds for now in moved}) > 1
        trajectory.at(0.0)
        assert trajectory.model is not None
        held = fingerprint_parts(trajectory.model)
        whole = fingerprint_parts(load_dense(trajectory.base_model["path"], torch.device("cpu"), torch.float32))
        assert held and all(whole[name] == part for name, part in held.items())


@pytest.mark.parametrize("stages", [2, 4])
def test_layers_that_move_change_nothing(stages: int, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    run_ranks(stages, tmp_path / "ranks", moving_run, str(alone), str(folder), stages)
    for case in ("stream", "heads", "tied"):
        assert written(folder / case) == written(alone / case), case
