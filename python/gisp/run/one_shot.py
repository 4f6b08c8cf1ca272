"""One-shot pruning: everything removed by a single scoring pass. The baseline the many small steps are measured by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from gisp.config.options import PruneConfig
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.model.structures import map_model
from gisp.run.setup import Setup, check_scores
from gisp.score.objectives import check_built_in
from gisp.score.questions import check_objective


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
    setup = Setup(config, model_map, data, sparsities)
    scored, scores = setup.score(1)
    check_scores(1, float(scored.loss), bool(scored.finite), bool(setup.selector.decides(scores)))
    selector = setup.selector
    for sparsity in sparsities:
        setup.allocate(sparsity)
        selection = selector.within_target(selector.rank(scores), sparsity * model_map.decoder_parameters)
        removal = selector.removal(selection.removed.cpu(), float(selection.threshold))
        setup.shrinkable.remove(removal.removed)
        try:
            yield removal.parameters / model_map.decoder_parameters, model
        finally:
            setup.shrinkable.rollback()
