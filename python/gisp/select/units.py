"""What is ranked against what: the units of selection, their normalisers, and how they stand for scored structures.

Units are numbered once for the whole model: those of heads in layer order, then channels in layer order. Mostly a unit
is one structure of its group. With ``gqa`` "balanced" the unit of rank ``r`` of a layer takes from each of its
key/value heads the kept query head with the ``r``-th lowest score (ties: the lower index first); its score is their sum
and its parameters are theirs. Lower ranks never score higher, so a layer loses its units from rank 0 on and keeps
equally many query heads per key/value head.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from gisp.model.structures import ModelMap, channels_name, heads_name


@dataclass(frozen=True)
class GroupUnits:
    """One group's stretch of the numbering of units.

    Attributes:
        start, stop: its units.
        structures: structures of the group that one unit takes.
        cost: parameters of a unit.
        divisor: normaliser of its score.
        minimum: fewest units to keep.
        multiple: kept units are a multiple of it.
    """

    name: str
    start: int
    stop: int
    structures: int
    cost: int
    divisor: float
    minimum: int
    multiple: int
    protected: bool

    @property
    def size(self) -> int:
        """Units of the group."""
        return self.stop - self.start

    @property
    def floor(self) -> int:
        """Fewest units the group can be left with: its minimum rounded up to its multiple."""
        return min(-(-self.minimum // self.multiple) * self.multiple, self.size)


def group_units(
    model_map: ModelMap, *, norm: str, protected: frozenset[int], align: int, keep_minimum: bool
) -> list[GroupUnits]:
    """Units of a model in the order of ``model_map.groups``; arguments as for
    :class:`gisp.select.selector.Selector`."""
    width, per_kv, kv_heads = model_map.intermediate_size, model_map.heads_per_kv, model_map.num_kv_heads
    head, channel = model_map.head_parameters, model_map.channel_parameters
    # Units of a layer, structures and query heads of a unit, parameters and scored weights of a unit.
    count, structures, heads, cost, weights = {
        "query": (model_map.num_heads, 1, 1, head, model_map.head_weights),
        "balanced": (per_kv, kv_heads, kv_heads, kv_heads * head, kv_heads * model_map.head_weights),
        "group": (kv_heads, 1, per_kv, model_map.kv_group_parameters, model_map.kv_group_weights),
    }[model_map.gqa]
    head_norm, channel_norm = {
        "params": (weights, model_map.channel_weights),
        "official": (heads * 4 * model_map.head_dim * model_map.hidden_size, 3 * width),
        "none": (1, 1),
        # A unit of several structures has the mean of their scores.
        "zscore": (structures, 1),
    }[norm]
    kinds = (
        (heads_name, count, structures, cost, head_norm, int(keep_minimum), 1),
        (channels_name, width, 1, channel, channel_norm, align * keep_minimum, align),
    )
    groups: list[GroupUnits] = []
    start = 0
    for name_of, units, members, parameters, divisor, minimum, multiple in kinds:
        for layer in range(len(model_map.layers)):
            groups.append(
                GroupUnits(
                    name=name_of(layer),
                    start=start,
                    stop=start + units,
                    structures=members,
                    cost=parameters,
                    divisor=float(divisor),
                    minimum=min(minimum, units),
                    multiple=multiple,
                    protected=layer in protected,
                )
            )
            start += units
    return groups


class BalancedHeads:
    """Translates between query heads and the units of ``gqa`` "balanced"; heads precede all other structures."""

    def __init__(self, model_map: ModelMap) -> None:
        self._shape = (len(model_map.layers), model_map.num_kv_heads, model_map.heads_per_kv)
        self._heads = len(model_map.layers) * model_map.num_heads

    def to_units(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of units, and of which query head each is made.

        Args:
            scores: [structures], +inf for what cannot go.

        Returns:
            [units], and int64 [layers, key/value heads, heads of each] with a head for every rank.
        """
        ranked, heads = scores[: self._heads].view(self._shape).sort(dim=2, stable=True)
        return torch.cat((ranked.sum(1).flatten(), scores[self._heads :])), heads

    def to_structures(self, units: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Which structures a mask of units takes; bool [units] to bool [structures]."""
        layers, kv_heads, per_kv = self._shape
        of_rank = units[: layers * per_kv].view(layers, 1, per_kv).expand(-1, kv_heads, -1)
        taken = torch.zeros_like(heads, dtype=torch.bool).scatter_(2, heads, of_rank)
        return torch.cat((taken.flatten(), units[layers * per_kv :]))


def structure_starts(model_map: ModelMap) -> list[int]:
    """Where each group's structures begin in a numbering of all of them, and the end."""
    return list(itertools.accumulate((group.count for group in model_map.groups), initial=0))
