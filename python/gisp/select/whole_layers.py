"""Selection of whole layers: all heads and channels of a layer go in one step or none does."""

from __future__ import annotations

import math

import numpy as np
import torch

from gisp.config.criteria import CRITERIA
from gisp.config.options import PruneConfig
from gisp.errors import GispError
from gisp.model.structures import ModelMap
from gisp.select.schedule import threshold_rank
from gisp.select.selector import Ranking, Selection, Selector, differ


class LayerSelector(Selector):
    """Lowest layers first. A layer has the lowest score of its channels; those that go whole have one score for all.

    Norms and output biases of a layer stay, as they do wherever a group loses everything. Neither a width multiple nor
    a minimum applies.

    Attributes:
        layer_parameters: decoder parameters that removing a layer removes.
    """

    def __init__(self, model_map: ModelMap, *, protected: frozenset[int]) -> None:
        super().__init__(model_map, norm="none", protected=protected, align=1, keep_minimum=False)
        layers = len(model_map.layers)
        self.layer_parameters = sum(g.cost * g.size for g in (self.groups[0], self.groups[layers]))
        self._layers = layers
        counts = torch.from_numpy(np.diff(self._starts))
        device = self._live.device
        # By structure: its layer. Groups of heads come first, then as many of channels.
        self._layer = (torch.arange(2 * layers).repeat_interleave(counts) % layers).to(device)

    def check_reach(self, config: PruneConfig, sparsity: float) -> None:
        """As :meth:`Selector.check_reach`.

        Raises:
            GispError: less than one layer.
        """
        one = self.layer_parameters / self.decoder_parameters
        if config.schedule == "parameters" and sparsity < one:
            raise GispError(
                f"sparsity {sparsity} is less than one layer, which is {one:.4f}: whole layers go with "
                f"--criterion {config.criterion}, give more"
            )
        super().check_reach(config, sparsity)

    def decides(self, scores: torch.Tensor) -> torch.Tensor:
        """As :meth:`Selector.decides`, of layers: all of a layer has one score."""
        return differ(self._of_layers(scores.masked_fill(self._barred, math.inf)[self.head_structures :]))

    def within_target(self, ranking: Ranking, target: float) -> Selection:
        """Lowest layers first while all removed parameters stay at or below ``target``."""
        budget = math.floor(target * (1 + 1e-12) - self.removed_parameters)
        return self._whole(ranking, self._live * self._cost, budget)

    def below_threshold(self, ranking: Ranking, ratio: float) -> Selection:
        """Lowest layers first while no more structures are gone than the ratio's threshold takes."""
        return self._whole(ranking, self._live, threshold_rank(self.size, ratio) - int(self._gone.sum()))

    def _of_layers(self, channels: torch.Tensor) -> torch.Tensor:
        """Scores of layers, [layers], from those of all their channels."""
        return channels.view(self._layers, -1).amin(1)

    def _whole(self, ranking: Ranking, spent: torch.Tensor, budget: int) -> Selection:
        """The lowest layers that fit.

        Args:
            spent: int64 [groups], what losing all of a group takes of the budget.
        """
        # Removed and protected structures are +inf, so a layer that cannot go is too.
        values = self._of_layers(ranking.values[self.first_channel :])
        ascending, order = values.sort(stable=True)
        fits = spent.view(2, -1).sum(0)[order].cumsum(0) <= budget
        taken = torch.zeros_like(fits).scatter_(0, order, fits & (ascending < math.inf))
        threshold = torch.where(taken, values, -math.inf).amax()
        return Selection(taken[self._layer] & ~self._barred, self._live * taken.repeat(2), threshold)


def make_selector(config: PruneConfig, model_map: ModelMap, protected: frozenset[int]) -> Selector:
    """The selector a run's resolved options ask for."""
    if CRITERIA[str(config.criterion)].whole_layers:
        return LayerSelector(model_map, protected=protected)
    return Selector(
        model_map,
        norm=str(config.norm),
        protected=protected,
        align=int(config.align or 1),
        keep_minimum=bool(config.keep_minimum),
    )
