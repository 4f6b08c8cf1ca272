"""A made-up run, and what tests of nested checkpoints share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from export_models import CHANNELS, HEADS, dense, tokens

from gisp.compensation import BlockUpdate, Compensation, CompensationOptions
from gisp.export.nested.export import export_nested
from gisp.export.nested.milestones import Milestone
from gisp.model.structures import channels_name, fingerprint, heads_name, map_model
from gisp.run.trajectory import StepRecord, Trajectory

STEPS = 5


def trajectory_of(model: Any, *, whole_layers: bool = True, seed: int = 0) -> Trajectory:
    """A made-up run of five steps: random structures go; if asked, layers end without heads or without channels."""
    model_map = map_model(model)
    generator = torch.Generator().manual_seed(seed)
    removed: dict[str, torch.Tensor] = {}
    for layer in range(len(model_map.layers)):
        for name, count in ((heads_name(layer), HEADS), (channels_name(layer), CHANNELS)):
            # Most go at some step, the rest (step 0) never.
            removed[name] = torch.randint(0, STEPS + 1, (count,), generator=generator).to(torch.int32)
    if whole_layers:
        removed[heads_name(1)] = torch.tensor([1, 2, 2, 3, 4, 3, 4, 2], dtype=torch.int32)
        removed[channels_name(2)] = torch.arange(CHANNELS, dtype=torch.int32) % 3 + 1
    steps, parameters = [], 0
    for step in range(1, STEPS + 1):
        lost = {
            kind: sum(int((at == step).sum()) for n, at in removed.items() if kind in n) for kind in ("heads", "chan")
        }
        parameters += lost["heads"] * model_map.head_parameters + lost["chan"] * model_map.channel_parameters
        share = parameters / model_map.decoder_parameters
        whole = parameters / model_map.parameters
        steps.append(StepRecord(step, share, share, whole, parameters, 0, 0, 1.0, 1, 1.0, 1))
    base = {"path": "some-org/some-model", "fingerprint": fingerprint(model), **model_map.describe()}
    data = {"spec": "made up", "sequences": 1, "sha256": ""}
    return Trajectory(
        removed, base, {"preset": "fast", "steps": STEPS}, data, {"torch": torch.__version__}, steps, True
    )


FORMS = ("weights", "weights and biases", "factors", "factors and biases", "biases")


def milestone_of(model: Any, trajectory: Trajectory, step: int, form: str = "weights and biases") -> Milestone:
    """A made-up compensation of a step: random changes of what its projections keep, one of them untouched."""
    model_map, keep = map_model(model), trajectory.keep(step)
    generator = torch.Generator().manual_seed(step)

    def near(values: torch.Tensor) -> torch.Tensor:
        return values * (1 + 0.2 * torch.randn(values.shape, generator=generator))

    updates = []
    for layer in range(1, len(model_map.layers)):
        columns = keep.columns(layer, model_map.head_dim)
        for name, kept in zip((heads_name(layer), channels_name(layer)), columns, strict=True):
            linear, block = model_map.outputs[name]
            own, weight, factors, bias = linear.weight.detach()[:, kept].float(), None, None, None
            if "weights" in form:
                weight = near(own).to(linear.weight.dtype)
            if "factors" in form and len(kept):
                factors = near(torch.ones(len(kept) // block))
            if "biases" in form:
                bias = 0.1 * torch.randn(len(own), generator=generator).to(linear.weight.dtype)
            updates.append(BlockUpdate(name, kept, weight, bias, factors))
    done = Compensation(CompensationOptions("bias"), tuple(updates), (), 4, 64)
    return Milestone(step, done, f"{form} of step {step}")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens()).logits
    return found


def sound_checkpoint(folder: Path) -> Path:
    """A nested checkpoint of a model with shared key/value heads."""
    base = dense("llama-gqa")
    export_nested(base, trajectory_of(base), folder)
    return folder


def sound_milestones(folder: Path) -> Path:
    """The same with compensations of their own at two steps."""
    base = dense("llama-gqa")
    trajectory = trajectory_of(base)
    milestones = [milestone_of(base, trajectory, 2), milestone_of(base, trajectory, 4, "factors")]
    export_nested(base, trajectory, folder, milestones=milestones)
    return folder
