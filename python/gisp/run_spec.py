"""A point of a run in the exporters' terms."""

from __future__ import annotations

from typing import Any

from gisp.export.spec import LayerKeep, PrunedSpec
from gisp.structures import channels_name, heads_name
from gisp.trajectory import Trajectory


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
    )
