"""From the options of a run to what scores its steps."""

from __future__ import annotations

from gisp.config.criteria import GRADIENT, WHOLE_LAYERS
from gisp.config.options import PruneConfig
from gisp.data import Sequences
from gisp.data.batches import StepBatches
from gisp.model.shrink import ShrinkableModel
from gisp.score.block_influence import BlockInfluence
from gisp.score.flap import FLAP
from gisp.score.gradient import Engine
from gisp.score.magnitude import Magnitude
from gisp.score.objectives import SequenceLoss
from gisp.score.random_scores import Random
from gisp.score.wanda import WandaSP
from gisp.score.zscore import Scorer, Standardised


def make_scorer(
    config: PruneConfig, shrinkable: ShrinkableModel, data: Sequences, loss: SequenceLoss | None = None
) -> Scorer:
    """The criterion of a run on its model and data.

    Args:
        loss: a user's own loss, for criteria that see one.

    Raises:
        GispError: options that do not run here.
    """
    standardise = config.norm == "zscore"
    if config.criterion == "flap":
        return FLAP(shrinkable.map, step_batches(config, shrinkable, data), standardise=standardise)
    scorer = _plain(config, shrinkable, data, loss)
    return Standardised(scorer) if standardise else scorer


def step_batches(config: PruneConfig, shrinkable: ShrinkableModel, data: Sequences) -> StepBatches:
    """What the steps of a run see."""
    return StepBatches(
        shrinkable.map,
        data,
        kind=str(config.engine),
        batch_size=config.batch_size,
        tokens=config.batch_tokens,
        seed=config.seed,
    )


def _plain(config: PruneConfig, shrinkable: ShrinkableModel, data: Sequences, loss: SequenceLoss | None) -> Scorer:
    model_map, criterion = shrinkable.map, config.criterion
    if criterion in GRADIENT:
        return Engine(
            model_map,
            data,
            kind=str(config.engine),
            batch_size=config.batch_size,
            batch_tokens=config.batch_tokens,
            seed=config.seed,
            fp8=config.fp8,
            score=GRADIENT[criterion],
            shrunk=config.first_order == "shrunk",
            ema=float(config.ema or 0),
            loss=loss,
        )
    steps = step_batches(config, shrinkable, data)
    if criterion == "magnitude":
        return Magnitude(model_map, steps)
    if criterion == "random":
        return Random(shrinkable, steps, config.seed)
    if criterion == "wanda-sp":
        return WandaSP(model_map, steps)
    if criterion == WHOLE_LAYERS:
        return BlockInfluence(model_map, steps)
    raise ValueError(f"no criterion is named {criterion!r}")
