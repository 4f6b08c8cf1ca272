"""Magnitude: the sum of ``|W|`` over a structure. It reads no data; the forward pass is for the loss of the record."""

from __future__ import annotations

import torch

from gisp.data.batches import StepBatches
from gisp.model.structures import ModelMap
from gisp.score.forward import forward_pass
from gisp.score.gradient import StepScores
from gisp_kernels.groups import StructureGroup


class Magnitude:
    """Scores structures by the L1 norm of their weights, all projections together."""

    def __init__(self, model_map: ModelMap, steps: StepBatches) -> None:
        self._map = model_map
        self._steps = steps

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step."""
        loss, tokens = forward_pass(self._map, self._steps, step)
        return StepScores.of({group.name: _l1(group) for group in groups}, loss, tokens)


def _l1(group: StructureGroup) -> torch.Tensor:
    total = torch.zeros(group.count, dtype=torch.float32, device=group.projections[0].linear.weight.device)
    for projection in group.projections:
        weight = projection.linear.weight.detach().abs()
        lines = weight.sum(1 if projection.axis == "row" else 0, dtype=torch.float32)
        total += lines.view(group.count, -1).sum(1)
    return total
