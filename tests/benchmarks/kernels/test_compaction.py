"""A partition of a built model, and its baseline."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.registry import MODELS, Model
from benchmarks.kernels.tasks import compaction
from gisp_kernels import Compactor

TINY = Model(layers=2, hidden=16, heads=4, kv_heads=2, head_dim=4, channels=24, vocabulary=32)


@pytest.mark.parametrize("model", [TINY, MODELS["tiny"]])
def test_partition_of_a_built_model(model: Model) -> None:
    groups = compaction.build_groups(model, "cpu", torch.float32)
    total = model.layers * (model.heads + model.channels)
    assert sum(group.count for group in groups) == total
    removals = compaction.choose(groups, 0.25, 0)
    assert sum(map(len, removals.values())) == round(0.25 * total)
    watch, compactor = compaction.Watch(groups), Compactor(groups)
    compactor.remove(removals)
    watch.check(compactor)
    groups[0].projections[0].linear.weight[0, 0] += 1
    with pytest.raises(AssertionError, match="kept weights differ"):
        watch.check(compactor)


def test_baseline_of_compaction_keeps_the_same_weights() -> None:
    groups = compaction.build_groups(TINY, "cpu", torch.float32)
    removals = compaction.choose(groups, 0.25, 0)
    compaction._gather_all(groups, [compaction._kept_indices(g, removals.get(g.name)) for g in groups])
    counts = {group.name: group.count for group in groups}
    for group in groups:
        for (index, dim), projection in zip(
            compaction._kept_indices(group, removals.get(group.name)), group.projections, strict=True
        ):
            left = counts[group.name] - len(removals.get(group.name, ()))
            assert len(index) == left * projection.block
            assert int(index.max()) < projection.linear.weight.shape[dim]
