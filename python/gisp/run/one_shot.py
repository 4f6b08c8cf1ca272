"""One-shot pruning: everything removed by a single scoring pass. The baseline the many small steps are measured by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from gisp.config.options import PruneConfig
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model, protected_layers
from gisp.run.average import in_original_numbering
from gisp.score.base import make_scorer
from gisp.score.context import Context
from gisp.score.objectives import check_built_in
from gisp.score.questions import check_objective
from gisp.select.allocators import group_shares, layer_outliers
from gisp.select.whole_layers import make_selector


def one_shot(
    model: Any, data: Sequences, sparsities: Sequence[float], config: PruneConfig, *, uniform: bool = False
) -> Iterator[tuple[float, Any]]:
    """Prune ``model`` to each sparsity by one scoring pass over the dense model, and back again.

    Args:
        model: dense model; pruned in place while the caller holds a pair, dense again afterwards.
        data: calibration sequences, all of them scored once.
        config: options resolved with ``one_shot=True``: criterion, allocator, normaliser, protection, alignment.
        uniform: take the allocator ``uniform`` instead of the options' own.

    Yields:
        (sparsity reached, the model at it).

    Raises:
        GispError: options of a run of many steps, whose defaults are others; a loss of your own; a sparsity out of
            reach; data that do not go with the options; a loss or scores that are not finite.
    """
    if not config.one_shot:
        raise GispError("these options are of a run of many steps: make them by make_config(one_shot=True, ...)")
    config = dataclasses.replace(
        config, engine="exact", fp8=False, allocator="uniform" if uniform else config.allocator
    )
    check_built_in(config.objective)
    model_map = map_model(model, config.gqa)
    data = check_objective(data.checked(model_map.vocab_size), config)
    protected = protected_layers(len(model_map.layers), config.protect_first, config.protect_last)
    selector = make_selector(config, model_map, protected)
    for sparsity in sparsities:
        selector.check_reach(config, sparsity)
    shrinkable = ShrinkableModel(model_map)
    context = Context(shrinkable, data, config)
    outliers = layer_outliers(context, selector)
    live = {group.name for group in selector.groups if not group.protected}
    scorer = make_scorer(context)
    scored = scorer.score(1, [group for group in model_map.groups if group.name in live])
    if not (math.isfinite(float(scored.loss)) and bool(scored.finite)):
        raise GispError("the loss or the scores are not finite: check the weights and the data of this model")
    scores = in_original_numbering(scored.scores, shrinkable, len(selector.removed))
    for sparsity in sparsities:
        selector.allocate(group_shares(config, selector, outliers, sparsity))
        selection = selector.within_target(selector.rank(scores), sparsity * model_map.decoder_parameters)
        removal = selector.removal(selection.removed.cpu(), float(selection.threshold))
        shrinkable.remove(removal.removed)
        try:
            yield removal.parameters / model_map.decoder_parameters, model
        finally:
            shrinkable.rollback()
