"""What a criterion is: where the scores of a step come from, how it is made of options, and how users add their own."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gisp.config.criteria import CRITERIA, Criterion
from gisp.config.options import make_config
from gisp.errors import GispError
from gisp.score.context import Context
from gisp_kernels.groups import StructureGroup

# A criterion that needs no data: a group to its scores, floating point [group.count] in the group's present order.
GroupScore = Callable[[StructureGroup], torch.Tensor]


@dataclass(frozen=True)
class StepScores:
    """Scores of one step. Nothing here has waited for the GPU, but for what objective ``choice`` weighs answers by.

    Attributes:
        scores: group name -> fp32 [current count], on the model's device, by current position.
        loss: loss of the scored sequences before anything of this step is removed, 0-dim fp64 on the device.
        finite: whether all scores are finite, 0-dim bool on the device.
        tokens: tokens passed through the model.
    """

    scores: dict[str, torch.Tensor]
    loss: torch.Tensor
    finite: torch.Tensor
    tokens: int

    @classmethod
    def of(cls, scores: dict[str, torch.Tensor], loss: torch.Tensor, tokens: int) -> StepScores:
        """Scores of a step, with whether all of them are finite; arguments as the attributes."""
        finite = torch.isfinite(torch.cat([*scores.values()])).all() if scores else torch.isfinite(loss)
        return cls(scores, loss, finite, tokens)


class Scorer(Protocol):
    """Where the scores of a step come from."""

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step (1-based); the lowest are removed."""
        ...


def register_criterion(
    name: str,
    score: GroupScore | Callable[[Context], Scorer],
    *,
    options: Mapping[str, Any] | None = None,
    sees_loss: bool = False,
    whole_layers: bool = False,
) -> None:
    """Add a criterion, for ``criterion=name`` of :func:`gisp.prune`.

    It takes the place of an earlier one of that name, unless that is built in.

    Args:
        score: a function ``score(group)`` of a :class:`gisp_kernels.groups.StructureGroup` that returns a finite
            floating-point tensor [group.count], lowest first to go; or, for criteria that need data, a class built
            from a :class:`gisp.score.context.Context` with the method of :class:`Scorer`.
        options: options of a run that the criterion sets where they are not given.
        sees_loss: the scores depend on the objective (``context.loss`` is a user's own): without it objectives other
            than ``lm`` and ``completion`` are refused.
        whole_layers: a layer goes whole or not at all, by the lowest score of its channels.

    Raises:
        GispError: a name of a built-in criterion or no text, options that no run has.
    """
    if not isinstance(name, str) or not name.strip():
        raise GispError(f"a criterion cannot be named {name!r}: give it a name")
    earlier = CRITERIA.get(name)
    if earlier is not None and isinstance(earlier.score, str):
        raise GispError(f"criterion {name!r} is built in: give another name")
    if not callable(score):
        raise GispError(f"criterion {name} is {score!r}: give a function of a group, or a class")
    CRITERIA[name] = Criterion(score, dict(options or {}), sees_loss=sees_loss, whole_layers=whole_layers)
    try:
        make_config(**{"criterion": name, **CRITERIA[name].defaults})
    except GispError as error:
        if earlier is None:
            del CRITERIA[name]
        else:
            CRITERIA[name] = earlier
        raise GispError(f"criterion {name} sets what no run takes: {error}") from None


def make_scorer(context: Context) -> Scorer:
    """The criterion of a run on its model and data.

    Raises:
        GispError: options that do not run here.
    """
    name = str(context.config.criterion)
    criterion = CRITERIA[name]
    built_in = isinstance(criterion.score, str)
    score: Any = pkgutil.resolve_name(criterion.score) if isinstance(criterion.score, str) else criterion.score
    scorer: Scorer = score(context) if isinstance(score, type) else GroupScorer(name, score, context)
    if not built_in:
        scorer = CheckedScorer(name, scorer, context)
    if context.config.norm == "zscore" and not criterion.standardises:
        scorer = StandardisedScorer(scorer)
    return scorer


class GroupScorer:
    """Scores every group by a function of it alone; the forward pass is for the loss of the record."""

    def __init__(self, name: str, score: GroupScore, context: Context) -> None:
        self._name = name
        self._score = score
        self._context = context

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step."""
        loss, tokens = self._context.forward_pass(step)
        with torch.no_grad():
            scores = {g.name: _in_shape(self._name, g, self._score(g), self._context.device) for g in groups}
        return StepScores.of(scores, loss, tokens)


class CheckedScorer:
    """A user's criterion, whose scores are waited for and checked: what is wrong is named before it fails later."""

    def __init__(self, name: str, scorer: Scorer, context: Context) -> None:
        self._name = name
        self._scorer = scorer
        self._device = context.device

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step.

        Raises:
            GispError: they are not what the run takes.
        """
        found = self._scorer.score(step, groups)
        if not isinstance(found, StepScores):
            raise GispError(
                f"criterion {self._name} returns {type(found).__name__}: give gisp.score.base.StepScores.of(...)"
            )
        scores = {g.name: _in_shape(self._name, g, found.scores.get(g.name), self._device) for g in groups}
        wrong = [name for name, values in scores.items() if not bool(torch.isfinite(values).all())]
        if wrong:
            raise GispError(f"criterion {self._name} returns scores of {wrong[0]} that are not finite in float32")
        return StepScores.of(scores, torch.as_tensor(found.loss).to(self._device, torch.float64), found.tokens)


def _in_shape(name: str, group: StructureGroup, values: Any, device: torch.device) -> torch.Tensor:
    """What a criterion returns for a group as float32 [count] on the model's device."""
    tensor = isinstance(values, torch.Tensor)
    if not tensor or values.shape != (group.count,) or not values.is_floating_point():
        what = f"{values.dtype} {list(values.shape)}" if tensor else type(values).__name__
        raise GispError(
            f"criterion {name} returns {what} for {group.name}: "
            f"give a floating-point tensor with one score per structure, here [{group.count}]"
        )
    scores: torch.Tensor = values.detach().to(device, torch.float32)
    return scores


class StandardisedScorer:
    """``--norm zscore``: another criterion's scores, standardised over the structures that each group has left.

    FLAP, arXiv 2312.11983, Eq. 6.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step, each group's with mean 0 and standard deviation 1."""
        found = self._scorer.score(step, groups)
        scores = {name: standardised(values.double()).float() for name, values in found.scores.items()}
        return dataclasses.replace(found, scores=scores)


def standardised(values: torch.Tensor) -> torch.Tensor:
    """``(x - mean) / std`` with the unbiased standard deviation, float64 [n]; zeros where nothing differs."""
    centred = values - values.mean()
    deviation = (centred.square().sum() / max(1, len(values) - 1)).sqrt()
    return torch.where(deviation > 0, centred / deviation, torch.zeros_like(centred))
