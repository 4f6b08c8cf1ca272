"""The part of a run's base model that lies in one of several processes."""

from __future__ import annotations

from typing import Any

import torch

from gisp.errors import GispError
from gisp.model.structures import map_model
from gisp.replicas.agreement import agree, machine
from gisp.run.record import library_versions, removed_at_digest
from gisp.run.trajectory import Trajectory
from gisp.stages.group import Stages
from gisp.stages.load import skeleton
from gisp.stages.placement import Placement
from gisp.stages.rules import Sharing, check_sharing
from gisp.stages.stage_model import read_stage_model, shared_fingerprint


def staged_base(
    trajectory: Trajectory, stages: Stages, device: torch.device, dtype: torch.dtype | None
) -> tuple[Any, Placement]:
    """The layers of a stage of the dense base model, one chunk a stage, checked to be those the run pruned.

    Args:
        dtype: ``None`` for that of its files.

    Raises:
        GispError: no folder to read it from, more stages than layers, other weights, or a process with another run or
            other code, in every process.
    """
    # Each process reads the run by itself, from a disk of its own perhaps.
    removed = {name: at.numpy() for name, at in trajectory.removed_at.items()}
    agree(stages.processes, {**machine(device, library_versions()), "run": removed_at_digest(removed)})
    path = str(trajectory.base_model["path"])
    if not path:
        raise GispError("this run was made from a model in memory: --stages reads a folder, leave it out")
    check_sharing(Sharing(stages.count, stages.count, trajectory.layers))
    bounds = tuple(stage * trajectory.layers // stages.count for stage in range(stages.count + 1))
    placement = Placement(stages.count, bounds)
    model = read_stage_model(skeleton(path, dtype), path, placement, stages, device)
    if shared_fingerprint(map_model(model), stages) != trajectory.base_model["fingerprint"]:
        raise GispError("the base model of this run holds other weights by now: give its base model")
    return model, placement
