"""Standardised scores: ``--norm zscore`` for any criterion (FLAP, arXiv 2312.11983, Eq. 6)."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from gisp.score.gradient import StepScores
from gisp_kernels.groups import StructureGroup


class Scorer(Protocol):
    """Where the scores of a step come from."""

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores: ...


class Standardised:
    """Another criterion's scores, standardised over the structures that each group has left."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step, of either sign."""
        found = self._scorer.score(step, groups)
        scores = {name: standardised(values.double()).float() for name, values in found.scores.items()}
        return dataclasses.replace(found, scores=scores)


def standardised(values: torch.Tensor) -> torch.Tensor:
    """``(x - mean) / std`` with the unbiased standard deviation, float64 [n]; zeros where nothing differs."""
    centred = values - values.mean()
    deviation = (centred.square().sum() / max(1, len(values) - 1)).sqrt()
    return torch.where(deviation > 0, centred / deviation, torch.zeros_like(centred))
