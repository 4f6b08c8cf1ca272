"""How structures of different groups compete: by their scores, or by shares that every group is to lose.

``global``: one ranking of normalised scores. ``uniform``: the same fraction of every unprotected group, heads and
channels apart. ``owl``: a fraction per layer, less where more of it is outliers, the same for its heads and channels.
With shares a structure is ranked by the fraction of its group that scores no higher, divided by the group's share, so
that one global threshold gives every group its share at every size on the way
(:meth:`gisp.select.selector.Selector.allocate`).
"""

from __future__ import annotations

from gisp.config.options import OFFICIAL_RATIO, PruneConfig
from gisp.score.context import Context
from gisp.score.criteria.activation import outlier_ratios
from gisp.select.selector import Selector

# Half the widest difference of layers' fractions, OWL's lambda.
OWL_LAMBDA = 0.08


def layer_outliers(context: Context, selector: Selector) -> dict[int, float]:
    """What ``owl`` goes by: outlier ratios of the layers that are not protected; other allocators need none.

    They are counted on the dense model, once: shares do not change during a run, and a resumed run counts the same.
    """
    if context.config.allocator != "owl":
        return {}
    layers = len(context.map.layers)
    return outlier_ratios(context, [i for i in range(layers) if not selector.groups[i].protected])


def group_shares(
    config: PruneConfig, selector: Selector, outliers: dict[int, float], sparsity: float | None = None
) -> list[float] | None:
    """Part of its units that every group is to lose by the end of a run; ``None`` where scores alone decide.

    Args:
        outliers: see :func:`layer_outliers`.
        sparsity: where it ends (removed / all decoder parameters); by default as the schedule says.
    """
    if config.allocator == "global":
        return None
    layers = len(selector.groups) // 2
    shares = dict.fromkeys(range(layers), 1.0)
    if outliers:
        if sparsity is None and config.schedule == "structures":
            # Of the number of structures, protected ones included.
            fraction = float(config.ratio or OFFICIAL_RATIO) * selector.size / selector.unprotected
        else:
            prunable = sum(g.cost * g.size for g in selector.groups if not g.protected)
            end = float(config.sparsity or 0) if sparsity is None else sparsity
            fraction = end * selector.decoder_parameters / prunable
        shares |= owl_shares(outliers, fraction)
    return [shares[i % layers] for i in range(2 * layers)]


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
