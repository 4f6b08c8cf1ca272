"""Rounds after the last step of a schedule that bring removed structures back for others, at the same size.

A round scores all structures of the model, gone ones included, on fresh batches. Of the gone what is worth most comes
back, and the removal rule of the steps takes as much again of what was present. The round counts if the loss of batches
that scored nothing falls, else everything is as before.

The points of the run stay nested. A structure that came back counts as never removed: it leaves the step it went at.
What went for it goes at the step of the round. Steps before have then removed less than they once did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gisp.config.options import PruneConfig
from gisp.errors import GispError
from gisp.model.structures import ModelMap
from gisp.run.setup import Setup, check_scores
from gisp.run.trajectory import Trajectory, move_to
from gisp.score.gradient import GradientScorer
from gisp.score.worth import structure_worth
from gisp.select.exchange import resequenced, returning
from gisp.select.selector import Ranking

# Batches that a round scores with, and that it is judged by.
SCORED, JUDGED = 8, 8
# Part of the decoder's parameters that the first round may bring back; it falls to 0 in equal steps.
LARGEST = 0.02


@dataclass(frozen=True)
class Round:
    """What a round did.

    Attributes:
        loss: of the scored batches before it.
        tokens: tokens passed through the model.
        ranking: of what could go.
        threshold: highest normalised worth of what went, ``None`` for nothing.
        returned: structures that came back, 0 where it did not count.
        judged: loss of the judging batches before and after, ``None`` where nothing was to come back.
    """

    loss: float
    tokens: int
    ranking: Ranking
    threshold: float | None = None
    returned: int = 0
    judged: tuple[float, float] | None = None


class Regrowth:
    """Exchanges structures of a run at the end of its schedule.

    Args:
        trajectory: of the run; its ``removed_at`` is written in place.
    """

    def __init__(self, setup: Setup, model_map: ModelMap, config: PruneConfig, trajectory: Trajectory) -> None:
        self._setup, self._map, self._config, self._trajectory = setup, model_map, config, trajectory
        # Dense counts: those of the map's groups follow the model.
        self._counts = {group.name: group.count for group in model_map.groups}
        self._share = {group.name: model_map.members(group) for group in model_map.groups}
        self._best: float | None = None

    @property
    def last_batch(self) -> int:
        """Number of the last batch that rounds draw, in the count of the steps; 0 without rounds."""
        rounds = int(self._config.regrow)
        return self._config.steps + JUDGED + rounds * SCORED if rounds else 0

    def round(self, number: int) -> Round:
        """Round ``number`` (1-based), the step of the trajectory after those it has.

        Raises:
            GispError: loss or worth are not finite.
        """
        done, rounds = len(self._trajectory.steps), int(self._config.regrow)
        selector, target = self._setup.selector, float(self._config.sparsity or 0) * self._map.decoder_parameters
        best, judged = self._judge() if self._best is None else (self._best, 0)
        worth, loss, tokens = self._worth(number, done)
        # A resumed run judges again what the cut one had judged.
        tokens += judged if number == 1 else 0
        budget = LARGEST * self._map.decoder_parameters * (1 - (number - 1) / rounds)
        back = returning(selector, worth.double().cpu().numpy(), budget)
        if not back.any():
            self._best = best
            move_to(self._setup.shrinkable, self._trajectory, done)
            return Round(loss, tokens, selector.rank(worth))
        before = {name: at.clone() for name, at in self._trajectory.removed_at.items()}
        selector.restore(self._gone(selector.removed & ~back))
        # What comes back is not what goes for it.
        worth[torch.from_numpy(back).to(worth.device)] = torch.finfo(worth.dtype).max
        ranking = selector.rank(worth)
        selection = selector.within_target(ranking, target)
        removal = selector.removal(selection.removed.cpu(), float(selection.threshold))
        self._write(back, removal.removed, done + 1)
        move_to(self._setup.shrinkable, self._trajectory, done + 1)
        after, judged = self._judge()
        tokens += judged
        returned = int(back.sum())
        if after < best:
            selector.apply(removal, selection)
            self._best = after
        else:
            for name, at in before.items():
                self._trajectory.removed_at[name].copy_(at)
            selector.restore({name: torch.nonzero(at).flatten() for name, at in before.items()})
            move_to(self._setup.shrinkable, self._trajectory, done)
            self._best, returned = best, 0
        return Round(loss, tokens, ranking, removal.threshold if returned else None, returned, (best, after))

    def _judge(self) -> tuple[float, int]:
        """Loss of the model on batches that no round scores with, and the tokens passed."""
        first, total, tokens = self._config.steps + 1, 0.0, 0
        for step in range(first, first + JUDGED):
            loss, passed = self._setup.context.forward_pass(step)
            total += float(loss) / JUDGED
            tokens += passed
        if not math.isfinite(total):
            raise GispError(f"the loss after {first - 1} steps is {total}, not finite: check the data of this model")
        return total, tokens

    def _worth(self, number: int, done: int) -> tuple[torch.Tensor, float, int]:
        """Worth of all structures, fp32 [structures]; loss and tokens. The model is dense afterwards."""
        setup, selector = self._setup, self._setup.selector
        parts = torch.from_numpy(selector.removed).to(setup.context.device).split(list(self._counts.values()))
        closed = {name: part for name, part in zip(self._counts, parts, strict=True) if name in setup.open}
        setup.shrinkable.rollback(len(setup.shrinkable.history))
        first = self._config.steps + 1 + JUDGED + (number - 1) * SCORED
        groups = [group for group in self._map.groups if group.name in closed]
        assert isinstance(setup.scorer, GradientScorer)
        found = structure_worth(setup.scorer, range(first, first + SCORED), groups, closed)
        values = [
            found.values.get(name, torch.zeros(count, device=setup.context.device))
            for name, count in self._counts.items()
        ]
        worth = torch.cat(values)
        loss = float(found.loss)
        check_scores(done + 1, loss, bool(worth.isfinite().all()), decided=True)
        return worth, loss, found.tokens

    def _gone(self, removed: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
        """A mask of structures as heads and channels by group."""
        parts = torch.from_numpy(removed).split(list(self._counts.values()))
        return {
            name: torch.nonzero(part.repeat_interleave(self._share[name])).flatten()
            for name, part in zip(self._counts, parts, strict=True)
        }

    def _write(self, back: np.ndarray[Any, Any], removed: dict[str, torch.Tensor], step: int) -> None:
        """Put an exchange into the trajectory."""
        returned = self._gone(back)
        for group in self._setup.selector.groups:
            at = self._trajectory.removed_at[group.name]
            at[returned[group.name]] = 0
            if group.name in removed:
                at[removed[group.name]] = step
            if len(returned[group.name]):
                share = self._share[group.name]
                units = resequenced(at[::share].numpy().copy(), group.multiple)
                at.copy_(torch.from_numpy(units).repeat_interleave(share))
