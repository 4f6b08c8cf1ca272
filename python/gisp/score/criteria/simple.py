"""Criteria that read no data: magnitude, and the random order that any criterion has to beat."""

from __future__ import annotations

import torch

from gisp.score.base import StepScores
from gisp.score.context import Context
from gisp_kernels.groups import StructureGroup


def magnitude(group: StructureGroup) -> torch.Tensor:
    """L1 norm of every structure's weights, all projections together, float32 [count]."""
    total = torch.zeros(group.count, dtype=torch.float32, device=group.projections[0].linear.weight.device)
    for projection in group.projections:
        weight = projection.linear.weight.detach().abs()
        lines = weight.sum(1 if projection.axis == "row" else 0, dtype=torch.float32)
        total += lines.view(group.count, -1).sum(1)
    return total


class Random:
    """Uniform numbers in [0, 1), drawn once by original structure: of the seed alone, not of step or device."""

    def __init__(self, context: Context) -> None:
        self._context = context
        model_map = context.map
        # Of the dense model, whatever is left of it by now.
        per_layer = model_map.num_heads // model_map.heads_per_structure + model_map.intermediate_size
        generator = torch.Generator().manual_seed(context.config.seed)
        self._drawn = torch.rand(len(model_map.layers) * per_layer, dtype=torch.float32, generator=generator).to(
            context.device
        )

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step; the forward pass is for the loss of the record."""
        loss, tokens = self._context.forward_pass(step)
        numbers = self._context.shrinkable.numbers
        return StepScores.of({group.name: self._drawn[numbers(group.name)] for group in groups}, loss, tokens)
