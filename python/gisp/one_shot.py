"""One-shot pruning: everything removed by a single scoring pass. The baseline the many small steps are measured by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gisp.averaging import in_original_numbering
from gisp.config import PruneConfig
from gisp.data import Sequences
from gisp.engine import Engine
from gisp.select import Selector
from gisp.shrink import ShrinkableModel
from gisp.structures import map_model, protected_layers


def one_shot(
    model: Any, data: Sequences, sparsities: Sequence[float], config: PruneConfig, *, uniform: bool = False
) -> Iterator[tuple[float, Any]]:
    """Prune ``model`` to each sparsity by the exact scores of the dense model, and back again.

    Args:
        model: dense model; pruned in place while the caller holds a pair, dense again at the end.
        data: calibration sequences, all of them scored once.
        config: resolved options: normaliser, protection, alignment.
        uniform: the same fraction of heads and of channels in every unprotected layer instead of one global ranking.

    Yields:
        (sparsity reached, the model at it).
    """
    model_map = map_model(model, config.gqa)
    protected = protected_layers(len(model_map.layers), config.protect_first, config.protect_last)
    selector = Selector(
        model_map,
        # Ranks are not divided: the r-th best fraction of every layer competes with that of every other.
        norm="none" if uniform else str(config.norm),
        protected=protected,
        align=int(config.align or 1),
        keep_minimum=bool(config.keep_minimum),
    )
    engine = Engine(
        model_map,
        data,
        kind="exact",
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
    )
    live = {block.name for block in selector.blocks if not block.protected}
    scored = engine.score(1, [group for group in model_map.groups if group.name in live])
    scores = {name: _ranks(values) for name, values in scored.scores.items()} if uniform else scored.scores
    shrinkable = ShrinkableModel(model_map)
    ranking = selector.rank(in_original_numbering(scores, shrinkable, len(selector.removed)))
    for sparsity in sparsities:
        selection = selector.within_target(ranking, sparsity * model_map.decoder_parameters)
        choice = selector.choice(selection.removed.cpu(), float(selection.threshold))
        shrinkable.remove(choice.removed)
        yield choice.parameters / model_map.decoder_parameters, model
        shrinkable.rollback()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Rank of every structure within its group, as a fraction in [0, 1)."""
    ranks = torch.empty_like(values)
    ranks[torch.argsort(values, stable=True)] = torch.arange(len(values), device=values.device) / len(values)
    return ranks
