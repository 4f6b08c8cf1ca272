"""FLAP: how much what enters a column fluctuates, times the column's squared norm (arXiv 2312.11983, Eq. 5 and 6)."""

from __future__ import annotations

import torch

from gisp.data.batches import StepBatches
from gisp.model.structures import ModelMap
from gisp.score.forward import by_structure, forward_pass, output_projection
from gisp.score.gradient import StepScores
from gisp.score.zscore import standardised
from gisp_kernels import ActivationStatistics, record_activations
from gisp_kernels.groups import StructureGroup


class FLAP:
    """``S_j = Var_t(X_tj) * ||W_:j||^2`` (WIFV) over the inputs of o_proj and down_proj.

    A head, or a key/value head with its query heads, scores the mean over its columns.

    Args:
        standardise: first subtract the mean and divide by the standard deviation of all columns of the layer and module
            (Eq. 6). Columns, not heads: the mean over a head then spreads less than a channel does, as published.
    """

    def __init__(self, model_map: ModelMap, steps: StepBatches, *, standardise: bool) -> None:
        self._map = model_map
        self._steps = steps
        self._standardise = standardise

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step."""
        recorder = record_activations({group.name: output_projection(group).linear for group in groups})
        loss, tokens = forward_pass(self._map, self._steps, step, recorder)
        found = recorder.statistics()
        scores = {group.name: self._score(group, found[group.name]) for group in groups}
        return StepScores.of(scores, loss, tokens)

    def _score(self, group: StructureGroup, found: ActivationStatistics) -> torch.Tensor:
        weight = output_projection(group).linear.weight.detach()
        columns = found.variance * weight.double().square().sum(0)
        if self._standardise:
            columns = standardised(columns)
        return by_structure(columns, group).mean(1).float()
