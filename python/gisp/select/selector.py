"""Which structures a step removes: normalisation, one global ranking, and the two removal rules.

Everything runs on the device of the scores and nothing waits for it: a step is decided by a fixed sequence of sorts,
scans and gathers over all units (see :mod:`gisp.select.units`), whatever the numbers are. Ties go to the lowest
number. All arithmetic is float64 or integer, so that the choice depends on the fp32 scores alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gisp.config.options import OFFICIAL_RATIO, PruneConfig
from gisp.errors import GispError
from gisp.model.structures import ModelMap
from gisp.select.schedule import threshold_rank
from gisp.select.units import BalancedHeads, group_units, structure_starts


@dataclass(frozen=True)
class Ranking:
    """All units in the order in which they go; tensors on the device.

    Attributes:
        values: float64 [units], normalised scores, or what :meth:`Selector.allocate` makes of them; removed and
            protected units are +inf.
        ascending: the same, sorted.
        order: int64 [units], unit at every rank.
        ranks: int64 [units], ranks of each group's units, ascending within the group, groups one after another.
        heads: for "balanced", which query heads the units are made of.
    """

    values: torch.Tensor
    ascending: torch.Tensor
    order: torch.Tensor
    ranks: torch.Tensor
    heads: torch.Tensor | None


@dataclass(frozen=True)
class Selection:
    """What a step removes, still on the device.

    Attributes:
        removed: bool [structures].
        units: int64 [groups], units that go.
        threshold: 0-dim float64, highest normalised score among them, -inf when nothing goes.
    """

    removed: torch.Tensor
    units: torch.Tensor
    threshold: torch.Tensor


def differ(scores: torch.Tensor) -> torch.Tensor:
    """Whether at most one of scores [n] is finite, or two that are finite differ; 0-dim bool."""
    candidates = scores < math.inf
    return (candidates & (scores > scores.amin())).any() | (candidates.sum() <= 1)


@dataclass(frozen=True)
class StepRemoval:
    """What a step removes, on the host.

    Attributes:
        removed: group name -> original indices of heads or channels, int64, ascending.
        structures: their numbers, ascending; with ``gqa`` "group" a structure is a key/value head.
        parameters: decoder parameters these structures hold.
        threshold: highest normalised score among them, None when nothing goes.
    """

    removed: dict[str, torch.Tensor]
    structures: np.ndarray[Any, np.dtype[np.int64]]
    parameters: int
    threshold: float | None


class Selector:
    """Global ranking over the structures of one model.

    Attributes:
        groups: units of every group of structures.
        size: number of units.
        decoder_parameters: those of the dense model.
        head_structures: structures of all heads groups; they are numbered before the channels.
        first_channel: number of the first unit that is no head.
        unprotected: units of the layers that may be pruned, removed ones included.
        removed: bool [structures], on the host.

    Args:
        model_map: the dense model's map; its ``gqa`` says what a unit of heads is.
        norm: ``params`` (parameters of the scored structure, paper Eq. 9), ``official`` (what the released code
            divides by: 4*head_dim*hidden for every query head and 3*intermediate_size), ``none``, or ``zscore`` for
            scores that are standardised already.
        protected: layers never pruned.
        align: kept MLP widths are multiples of this.
        keep_minimum: keep at least one unit of heads and ``align`` channels per layer.
    """

    def __init__(
        self, model_map: ModelMap, *, norm: str, protected: frozenset[int], align: int, keep_minimum: bool
    ) -> None:
        self.groups = group_units(model_map, norm=norm, protected=protected, align=align, keep_minimum=keep_minimum)
        self.size = self.groups[-1].stop
        self.decoder_parameters = model_map.decoder_parameters
        self._balanced = BalancedHeads(model_map) if model_map.gqa == "balanced" else None
        starts = structure_starts(model_map)
        self.head_structures = starts[len(model_map.layers)]
        self.first_channel = self.groups[len(model_map.layers)].start
        self.unprotected = sum(g.size for g in self.groups if not g.protected)
        self._starts = np.array(starts)
        self._number = {group.name: i for i, group in enumerate(self.groups)}
        # By group: query heads or channels of a structure, parameters and structures of a unit, units that are gone.
        self._per_structure = [model_map.members(group) for group in model_map.groups]
        self._costs = np.array([g.cost for g in self.groups])
        self._members = np.array([g.structures for g in self.groups])
        self._gone = np.zeros(len(self.groups), dtype=np.int64)
        self.removed = np.zeros(starts[-1], dtype=bool)

        device = model_map.weight.device

        def on_device(values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        units = on_device([g.size for g in self.groups])
        self._live = units.clone()
        self._last = on_device([g.stop - 1 for g in self.groups])
        self._multiple = on_device([g.multiple for g in self.groups])
        self._floor = on_device([g.floor for g in self.groups])
        self._cost = on_device([g.cost for g in self.groups])
        # By unit: its group.
        self._group = torch.arange(len(self.groups), device=device).repeat_interleave(units)
        self._units = units
        self._shares: torch.Tensor | None = None
        self._divisor = on_device([g.divisor for g in self.groups], torch.float64)[self._group]
        # Position of every unit in its group.
        self._position = torch.arange(self.size, device=device) - on_device([g.start for g in self.groups])[self._group]
        counts = on_device(np.diff(starts).tolist())
        # Structures that cannot be chosen (any more).
        self._barred = on_device([g.protected for g in self.groups], torch.bool).repeat_interleave(counts)

    @property
    def removed_parameters(self) -> int:
        """Decoder parameters removed so far."""
        return int(self._gone @ self._costs)

    def parameters_of(self, removed: np.ndarray) -> int:
        """Decoder parameters that the structures of a mask hold, bool [structures]."""
        counts = np.add.reduceat(removed, self._starts[:-1], dtype=np.int64)
        return int(counts // self._members @ self._costs)

    def structures_at(self, removed_at: Mapping[str, torch.Tensor]) -> np.ndarray:
        """By structure the step of heads and channels by group, int32 [structures]."""
        parts = zip(self.groups, self._per_structure, strict=True)
        return np.concatenate([removed_at[group.name].numpy()[::share] for group, share in parts])

    @property
    def removable_parameters(self) -> int:
        """The most that can ever be removed, protection and minima respected."""
        return sum(g.cost * (g.size - g.floor) for g in self.groups if not g.protected)

    def check_reach(self, config: PruneConfig, sparsity: float) -> None:
        """Require a sparsity, or the ratio of a schedule of structures, that the unprotected structures allow.

        Raises:
            GispError: more than can be removed.
        """
        where = f"with {self.size - self.unprotected} of {self.size} structures protected"
        if config.schedule == "structures":
            ratio = float(config.ratio or OFFICIAL_RATIO)
            if threshold_rank(self.size, ratio) > self.unprotected:
                raise GispError(f"ratio {ratio} is out of reach {where}: lower --ratio or protect fewer layers")
        most = self.removable_parameters / self.decoder_parameters
        if sparsity > most:
            raise GispError(
                f"sparsity {sparsity} is out of reach: at most {most:.4f} {where}, "
                "lower --sparsity or protect fewer layers"
            )

    def allocate(self, shares: Sequence[float] | None) -> None:
        """Rank from now on by how much of its group a unit goes with, divided by the group's share.

        The unit of a group of n that goes after k others is ranked by ``(k + 1/2) / n / share``, units removed earlier
        counted: at a threshold of t every group has lost the part ``t * share`` of its units, to the nearest unit.

        Args:
            shares: for every group the relative part it is to lose, 0 = last of all; ``None``: rank by scores alone.
        """
        if shares is None:
            self._shares = None
            return
        smallest = torch.finfo(torch.float32).tiny
        self._shares = torch.tensor(shares, dtype=torch.float64, device=self._live.device).clamp_min(smallest)

    def rank(self, scores: torch.Tensor) -> Ranking:
        """Normalise and sort.

        Args:
            scores: fp32 [structures] on the model's device, in original numbering; those of removed and protected
                structures do not matter.
        """
        values, heads = scores.double().masked_fill(self._barred, math.inf), None
        if self._balanced:
            values, heads = self._balanced.to_units(values)
        values = values / self._divisor
        ascending, order, ranks = self._sorted(values)
        if self._shares is not None:
            part = (self._position + (self._units - self._live)[self._group] + 0.5) / self._units[self._group]
            # Units that cannot go are the last of their group.
            allocated = torch.empty_like(values).scatter_(0, order[ranks], part / self._shares[self._group])
            values = torch.where(values < math.inf, allocated, math.inf)
            ascending, order, ranks = self._sorted(values)
        return Ranking(values, ascending, order, ranks, heads)

    def _sorted(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``ascending``, ``order`` and ``ranks`` of a ranking."""
        ascending, order = values.sort(stable=True)
        # Few bits to sort by: group numbers, in the order of the ranking.
        return ascending, order, self._group[order].to(torch.int16).sort(stable=True).indices

    def decides(self, scores: torch.Tensor) -> torch.Tensor:
        """Whether scores say which structures go, a bool on the device: not if all that can go have one score.

        Some may tie. A single candidate, or none, leaves nothing to decide.

        Args:
            scores: as for :meth:`rank`.
        """
        return differ(scores.masked_fill(self._barred, math.inf))

    def within_target(self, ranking: Ranking, target: float) -> Selection:
        """Lowest scores first while all removed parameters stay at or below ``target``.

        With alignment the longest run of the ranking counts whose aligned removal fits.
        """
        # Equality of target and sum is exact in the reals; floats may miss it by rounding.
        budget = math.floor(target * (1 + 1e-12) - self.removed_parameters)
        # What a group loses never falls as more of it is wanted, so the cost of a run is the sum of the steps it takes.
        before, after = self._allowed(self._position, self._group), self._allowed(self._position + 1, self._group)
        spent = torch.empty_like(before).scatter_(0, ranking.ranks, (after - before) * self._cost[self._group])
        count = (spent.cumsum(0)[: self._candidates()] <= budget).sum()
        return self._selection(ranking, count)

    def below_threshold(self, ranking: Ranking, ratio: float) -> Selection:
        """Every live structure at or below the k-th smallest score, removed ones counting as the lowest.

        Protected ones count as +inf and stay in the number of structures, as in the released code.
        """
        rank = threshold_rank(self.size, ratio) - int(self._gone.sum())
        candidates = ranking.ascending[: self._candidates()]
        if rank < 1:
            return self._selection(ranking, torch.zeros_like(ranking.order[0]))
        return self._selection(ranking, (candidates <= ranking.ascending[rank - 1]).sum())

    def removal(self, removed: torch.Tensor, threshold: float) -> StepRemoval:
        """What a selection says once it is on the host.

        Args:
            removed: ``Selection.removed`` on the CPU.
            threshold: ``Selection.threshold``.
        """
        structures = np.flatnonzero(removed.numpy())
        bounds = np.searchsorted(structures, self._starts)
        filled = np.flatnonzero(bounds[1:] > bounds[:-1]).tolist()
        by_group = {
            self.groups[i].name: torch.from_numpy(
                self._indices(i, structures[bounds[i] : bounds[i + 1]] - self._starts[i])
            )
            for i in filled
        }
        parameters = int(np.diff(bounds) // self._members @ self._costs)
        return StepRemoval(by_group, structures, parameters, threshold if filled else None)

    def given(self, removed: Mapping[str, torch.Tensor]) -> tuple[StepRemoval, Selection]:
        """A removal made earlier, from its ``removed``."""
        mask = torch.zeros(len(self.removed), dtype=torch.bool)
        for name, index in removed.items():
            i = self._number[name]
            mask[self._starts[i] + (index // self._per_structure[i])] = True
        taken = [int(n) for n in np.add.reduceat(mask.numpy(), self._starts[:-1], dtype=np.int64) // self._members]
        device = self._live.device
        selection = Selection(mask.to(device), torch.tensor(taken, device=device), torch.tensor(math.nan))
        return self.removal(mask, math.nan), selection

    def apply(self, removal: StepRemoval, selection: Selection) -> None:
        """Count a removal; ``selection`` is what it was made from."""
        self.removed[removal.structures] = True
        self._gone += np.diff(np.searchsorted(removal.structures, self._starts)) // self._members
        self._barred |= selection.removed
        self._live -= selection.units

    def restore(self, removed: Mapping[str, torch.Tensor]) -> None:
        """Forget every removal but one made earlier, from its ``removed``."""
        self._barred &= ~torch.from_numpy(self.removed).to(self._barred.device)
        self.removed[:] = False
        self._gone[:] = 0
        self._live = self._units.clone()
        self.apply(*self.given(removed))

    def _candidates(self) -> int:
        """Units that are neither removed nor protected."""
        return self.unprotected - int(self._gone.sum())

    def _indices(self, group: int, structures: np.ndarray) -> np.ndarray:
        """Heads or channels of a group's structures."""
        share = self._per_structure[group]
        return structures if share == 1 else (structures[:, None] * share + np.arange(share)).ravel()

    def _allowed(self, wanted: torch.Tensor, group: torch.Tensor | None = None) -> torch.Tensor:
        """How many of ``wanted`` removals a group's width multiple and its minimum let through.

        Args:
            wanted: int64, for every group or for those numbered in ``group``.
        """
        limits = (self._live, self._multiple, self._floor)
        live, multiple, floor = limits if group is None else (limit[group] for limit in limits)
        kept = -((wanted - live) // multiple) * multiple
        return live - torch.minimum(torch.maximum(kept, floor), live)

    def _selection(self, ranking: Ranking, count: torch.Tensor) -> Selection:
        """The ``count`` lowest less each group's best few that its width multiple or minimum defers."""
        wanted = (ranking.ranks < count).cumsum(0)[self._last]
        units = self._allowed(torch.cat((wanted[:1], wanted.diff())))
        taken = self._position < units[self._group]
        removed = torch.empty_like(taken).scatter_(0, ranking.order[ranking.ranks], taken)
        threshold = torch.where(removed, ranking.values, -math.inf).amax()
        if self._balanced and ranking.heads is not None:
            removed = self._balanced.to_structures(removed, ranking.heads)
        return Selection(removed, units, threshold)
