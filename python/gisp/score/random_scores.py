"""Random: one number per structure, drawn once for a run. The floor any criterion has to beat."""

from __future__ import annotations

import torch

from gisp.data.batches import StepBatches
from gisp.model.shrink import ShrinkableModel
from gisp.score.forward import forward_pass
from gisp.score.gradient import StepScores
from gisp_kernels.groups import StructureGroup


class Random:
    """Uniform numbers in [0, 1) by original structure: a function of the seed, whatever the step and the device."""

    def __init__(self, shrinkable: ShrinkableModel, steps: StepBatches, seed: int) -> None:
        self._shrinkable = shrinkable
        self._steps = steps
        model_map = shrinkable.map
        # Of the dense model, whatever is left of it by now.
        per_layer = model_map.num_heads // model_map.heads_per_structure + model_map.intermediate_size
        structures = len(model_map.layers) * per_layer
        drawn = torch.rand(structures, generator=torch.Generator().manual_seed(seed))
        self._drawn = drawn.to(next(model_map.model.parameters()).device)

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step; the forward pass is for the loss of the record."""
        loss, tokens = forward_pass(self._shrinkable.map, self._steps, step)
        scores = {group.name: self._drawn[self._shrinkable.numbers(group.name)] for group in groups}
        return StepScores.of(scores, loss, tokens)
