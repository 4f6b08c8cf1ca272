"""What a run scores and selects with, made from its options: the same for many steps and for one."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from gisp.config.options import PruneConfig
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.model.probe import PROVEN, check_independence
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import ModelMap, protected_layers
from gisp.replicas.group import Replicas
from gisp.score.average import in_original_numbering
from gisp.score.base import StepScores, make_scorer
from gisp.score.context import Context
from gisp.score.objectives import SequenceLoss
from gisp.select.allocators import group_shares, layer_outliers
from gisp.select.whole_layers import make_selector
from gisp.stages.group import Stages
from gisp.stages.stage_model import shared_fingerprint


class Setup:
    """Selector and scorer of a run over a dense model, which can be pruned from now on.

    Args:
        sparsities: those the run is to reach.
        replicas: the processes that score together, this one alone for ``None``.
        stages: where the model's layers lie, ``None`` where all are in this process.

    Attributes:
        selector, shrinkable: choose structures, and remove them from the model.
        context: what the scorer was built from.
        scorer: scores a step.
        open: names of the groups of the layers that may be pruned.

    Raises:
        GispError: a sparsity out of reach, or options that do not go with the model or the data.
    """

    def __init__(
        self,
        config: PruneConfig,
        model_map: ModelMap,
        data: Sequences,
        sparsities: Iterable[float],
        loss: SequenceLoss | None = None,
        replicas: Replicas | None = None,
        stages: Stages | None = None,
    ) -> None:
        protected = protected_layers(len(model_map.layers), config.protect_first, config.protect_last)
        self.selector = make_selector(config, model_map, protected)
        for sparsity in sparsities:
            self.selector.check_reach(config, sparsity)
        known = shared_fingerprint(model_map, stages) if stages else None
        self.shrinkable = ShrinkableModel(model_map, known)
        if model_map.model_type not in PROVEN:
            check_independence(self.shrinkable)
        self.context = Context(self.shrinkable, data, config, loss, replicas or Replicas(), stages)
        self.scorer = make_scorer(self.context)
        self._config, self._outliers = config, layer_outliers(self.context, self.selector)
        self.open = {group.name for group in self.selector.groups if not group.protected}

    def allocate(self, sparsity: float | None = None) -> None:
        """Set what every layer is to lose by a sparsity, ``None`` for the end of the run's schedule."""
        self.selector.allocate(group_shares(self._config, self.selector, self._outliers, sparsity))

    def score(self, step: int) -> tuple[StepScores, torch.Tensor]:
        """Scores of what is left at a step (1-based), also as fp32 [structures] in original numbering."""
        live = [g for g in self.shrinkable.map.groups if g.name in self.open and self.shrinkable.kept(g.name)]
        scored = self.scorer.score(step, live)
        return scored, in_original_numbering(scored.scores, self.shrinkable, len(self.selector.removed))


def check_scores(step: int, loss: float, finite: bool, decided: bool) -> None:
    """Refuse a step whose loss or scores are not finite, or whose scores are all the same.

    Raises:
        GispError: names the step.
    """
    if not math.isfinite(loss):
        raise GispError(f"the loss of step {step} is {loss}, not finite: check the weights and the data of this model")
    if not finite:
        raise GispError(f"scores of step {step} are not finite: use --dtype float32 or check the weights")
    if not decided:
        raise GispError(
            f"all scores of step {step} are equal (loss {loss:.6g}), so nothing says what to remove: "
            "check the weights and the data of this model, or use --dtype float32"
        )
