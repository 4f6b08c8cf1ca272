"""A pruned point is one thing: from a run's steps, from a model in memory, and back to a removal."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.model.keep import Keep, block_columns, kv_heads, missing
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model

REMOVED = {"layers.0.channels": torch.tensor([1, 5]), "layers.2.heads": torch.tensor([0, 1])}


@pytest.mark.parametrize("gqa", ["query", "group"])
def test_a_model_keeps_what_a_removal_left(gqa: str) -> None:
    model_map = map_model(tiny_model("llama-gqa"), gqa)
    shrinkable = ShrinkableModel(model_map)
    dense = shrinkable.keep()
    assert dense.removed(model_map) == {}
    shrinkable.remove(REMOVED)
    keep = shrinkable.keep()
    assert keep.heads[2] == (2, 3) and keep.heads[0] == (0, 1, 2, 3)
    assert keep.channels[0] == tuple(missing((1, 5), 24))
    gone = keep.removed(model_map)
    assert gone.keys() == REMOVED.keys() and all(torch.equal(gone[name], REMOVED[name]) for name in gone)
    shrinkable.rollback()
    assert shrinkable.keep() == dense
    shrinkable.remove(gone)
    assert shrinkable.keep() == keep


def test_a_step_of_a_run_keeps_what_its_model_keeps() -> None:
    trajectory = gisp.prune(tiny_model(), tiny_tokens(16, 16), preset="paper", steps=3, sparsity=0.4, seed=1)
    for step in (3, 1, 0):
        shrinkable = ShrinkableModel.of(trajectory.at(trajectory.sparsity_at(step)))
        assert shrinkable is not None and shrinkable.keep() == trajectory.keep(step)
    assert shrinkable is not None
    assert not trajectory.keep(0).removed(shrinkable.map)


def test_columns_are_whole_heads() -> None:
    keep = Keep(heads=((0, 2), ()), channels=((3,), (0, 1)))
    heads, channels = keep.columns(0, head_dim=3)
    assert heads.tolist() == [0, 1, 2, 6, 7, 8] and channels.tolist() == [3]
    heads, channels = keep.columns(1, head_dim=3)
    assert heads.dtype == torch.int64 and heads.tolist() == [] and channels.tolist() == [0, 1]
    assert block_columns(torch.tensor([2, 0]), 2).tolist() == [4, 5, 0, 1]
    assert kv_heads((0, 1, 4, 5, 7), 2) == [0, 2, 3] and missing((0, 2), 4) == [1, 3]
