"""Wanda-sp: mean weight of a column times the root mean square of its input (a baseline of FLAP, arXiv 2312.11983)."""

from __future__ import annotations

import torch

from gisp.data.batches import StepBatches
from gisp.model.structures import ModelMap
from gisp.score.forward import by_structure, forward_pass, output_projection
from gisp.score.gradient import StepScores
from gisp_kernels import ActivationStatistics, record_activations
from gisp_kernels.groups import StructureGroup


class WandaSP:
    """``S_j = mean_i |W_ij| * sqrt(mean_t X_tj^2)`` over the inputs of o_proj and down_proj.

    A head, or a key/value head with its query heads, scores the sum over its columns.
    """

    def __init__(self, model_map: ModelMap, steps: StepBatches) -> None:
        self._map = model_map
        self._steps = steps

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step."""
        recorder = record_activations({group.name: output_projection(group).linear for group in groups})
        loss, tokens = forward_pass(self._map, self._steps, step, recorder)
        found = recorder.statistics()
        scores = {group.name: _score(group, found[group.name]) for group in groups}
        return StepScores.of(scores, loss, tokens)


def _score(group: StructureGroup, found: ActivationStatistics) -> torch.Tensor:
    weight = output_projection(group).linear.weight.detach()
    rms = (found.sumsq / found.count.clamp_min(1)).sqrt()
    mean = weight.abs().sum(0, dtype=torch.float64) / weight.shape[0]
    return by_structure(mean * rms, group).sum(1).float()
