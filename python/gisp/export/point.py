"""A point of a run in the exporters' terms."""

from __future__ import annotations

from typing import Any

import torch

from gisp.export.spec import LayerKeep, LayerRanking, PrunedSpec
from gisp.model.structures import channels_name, heads_name
from gisp.run.trajectory import Trajectory


def pruned_spec(trajectory: Trajectory, step: int) -> PrunedSpec:
    """The state after ``step``."""

    def indices(name: str) -> tuple[int, ...]:
        return tuple(trajectory.kept(name, step).tolist())

    layers = tuple(
        LayerKeep(heads=indices(heads_name(i)), channels=indices(channels_name(i))) for i in range(trajectory.layers)
    )
    run: dict[str, Any] = {
        "base_model": trajectory.base_model,
        "config": trajectory.config,
        "versions": trajectory.versions,
    }
    return PrunedSpec(
        layers=layers,
        sparsity=trajectory.sparsity_at(step),
        model_sparsity=trajectory.model_sparsity_at(step),
        step=step,
        run=run,
        ranking=tuple(_ranking(trajectory, i) for i in range(trajectory.layers)),
    )


def _ranking(trajectory: Trajectory, layer: int) -> LayerRanking:
    heads, channels = (trajectory.removed_at[name(layer)] for name in (heads_name, channels_name))
    return LayerRanking(
        heads=last_to_go(heads),
        channels=last_to_go(channels),
        tied_heads=int((heads == 0).sum()),
        tied_channels=int((channels == 0).sum()),
    )


def last_to_go(removed_at: torch.Tensor) -> tuple[int, ...]:
    """Structures of a group, those the run kept first, then those it removed latest; ties by lowest index.

    Args:
        removed_at: int32 [structures], 0 = kept, t = removed at step t.
    """
    steps = removed_at.tolist()
    return tuple(sorted(range(len(steps)), key=lambda i: (steps[i] != 0, -steps[i], i)))
