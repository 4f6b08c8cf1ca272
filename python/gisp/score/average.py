"""Moving average of scores over steps, in one buffer for the whole model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gisp.errors import GispError
from gisp.model.shrink import ShrinkableModel
from gisp_kernels.groups import StructureGroup


def in_original_numbering(scores: Mapping[str, torch.Tensor], shrinkable: ShrinkableModel, size: int) -> torch.Tensor:
    """Scores by current position, group name -> fp32 [kept], as fp32 [structures]; zero where there is none."""
    first = shrinkable.numbers(shrinkable.map.groups[0].name)
    spread = torch.zeros(size, dtype=torch.float32, device=first.device)
    if not scores:
        return spread
    return spread.scatter_(0, torch.cat([shrinkable.numbers(name) for name in scores]), torch.cat([*scores.values()]))


class ScoreAverage:
    """Scores averaged over steps with weight ``weight`` for the past; with 0 the scores themselves.

    Args:
        groups: all groups, in the order of the numbering.
        averaged: names of those whose average is part of the state.
    """

    def __init__(self, groups: list[StructureGroup], averaged: set[str], weight: float, device: torch.device) -> None:
        self.weight = weight
        self._spans: dict[str, slice] = {}
        start = 0
        for group in groups:
            if group.name in averaged:
                self._spans[group.name] = slice(start, start + group.count)
            start += group.count
        self.average = torch.zeros(start if weight else 0, dtype=torch.float32, device=device)

    def update(self, scores: torch.Tensor, step: int) -> torch.Tensor:
        """Take in the scores of a step (1-based), fp32 [structures]; the average so far."""
        if self.weight == 0:
            return scores
        self.average = self.weight * self.average + (1 - self.weight) * scores
        # The start from zero is divided out, so that early thresholds are comparable with late ones.
        return self.average / (1 - self.weight**step)

    def state(self, average: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a resumed run needs, from a copy of ``self.average``: group name -> fp32 [count]."""
        return {name: average[span] for name, span in self._spans.items()} if self.weight else {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up the average of a cut run.

        Raises:
            GispError: the state is not that of this model.
        """
        average = torch.zeros(self.average.shape, dtype=torch.float32)
        for name, values in state.items():
            span = self._spans.get(name)
            if span is None or values.shape != average[span].shape:
                raise GispError(f"the state of the run holds {name} {tuple(values.shape)}, which this model has not")
            if not bool(values.isfinite().all()):
                raise GispError(f"the state of the run holds scores of {name} that are not finite: it is corrupt")
            average[span] = values
        self.average = average.to(self.average.device)
