"""How structures of different blocks compete: by their scores, or by shares that every block is to lose.

``global``: one ranking of normalised scores. ``uniform``: the same fraction of every unprotected block, heads and
channels apart. ``owl``: a fraction per layer, less where more of it is outliers, the same for its heads and channels.
With shares a structure is ranked by the fraction of its block that scores no higher, divided by the block's share, so
that one global threshold gives every block its share at every size on the way
(:meth:`gisp.select.selector.Selector.allocate`).
"""

from __future__ import annotations

from gisp.config.options import OFFICIAL_RATIO, PruneConfig
from gisp.data import Sequences
from gisp.model.shrink import ShrinkableModel
from gisp.score.outliers import outlier_ratios
from gisp.score.registry import step_batches
from gisp.select.selector import Selector

# Half the widest difference of layers' fractions, OWL's lambda.
OWL_LAMBDA = 0.08


class Allocator:
    """Sets the shares of a selector's blocks.

    For ``owl`` the layers' outliers are counted here, once, on the dense model: shares do not change during a run, and
    a resumed run counts the same.

    Args:
        shrinkable: the model, still dense.
    """

    def __init__(self, config: PruneConfig, shrinkable: ShrinkableModel, data: Sequences, selector: Selector) -> None:
        self._kind = config.allocator
        self._selector = selector
        self._layers = len(shrinkable.map.layers)
        self._parameters = shrinkable.map.decoder_parameters
        self._ratios: dict[int, float] = {}
        if self._kind == "owl":
            open_layers = [i for i in range(self._layers) if not selector.blocks[i].protected]
            self._ratios = outlier_ratios(shrinkable.map, step_batches(config, shrinkable, data), open_layers)

    def aim(self, sparsity: float) -> None:
        """Set the shares with which the run ends at a sparsity (removed / all decoder parameters)."""
        prunable = sum(b.cost * (b.stop - b.start) for b in self._selector.blocks if not b.protected)
        self._share(sparsity * self._parameters / prunable)

    def aim_structures(self, ratio: float) -> None:
        """Set the shares with which the run ends at a ratio of the number of structures, protected ones included."""
        self._share(ratio * self._selector.size / self._selector.unprotected)

    def aim_for(self, config: PruneConfig) -> None:
        """Set the shares for the end of a run's schedule."""
        if config.schedule == "structures":
            self.aim_structures(float(config.ratio or OFFICIAL_RATIO))
        else:
            self.aim(float(config.sparsity or 0))

    def _share(self, fraction: float) -> None:
        if self._kind == "global":
            return
        shares = dict.fromkeys(range(self._layers), 1.0)
        if self._kind == "owl":
            shares |= owl_shares(self._ratios, fraction)
        self._selector.allocate([shares[i % self._layers] for i in range(2 * self._layers)])


def owl_shares(ratios: dict[int, float], fraction: float, half_width: float = OWL_LAMBDA) -> dict[int, float]:
    """Fraction every layer is to lose, from the outliers it holds (OWL, arXiv 2310.05175).

    The kept fractions are the outlier ratios, stretched linearly to a range of ``2 * half_width`` around
    ``1 - fraction`` as their mean, and cut to [0, 1]. Layers that hold equally many outliers lose equally much.
    """
    low, high = min(ratios.values()), max(ratios.values())
    if high == low:
        return dict.fromkeys(ratios, min(1.0, fraction))
    stretched = {layer: (ratio - low) * 2 * half_width / (high - low) for layer, ratio in ratios.items()}
    mean = sum(stretched.values()) / len(stretched)
    return {layer: min(1.0, max(0.0, fraction - (value - mean))) for layer, value in stretched.items()}
