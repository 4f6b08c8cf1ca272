"""Who is where in partitioned groups: the plan of a removal, for all groups of a model at once, in numpy.

Structures are numbered group after group. The first ``kept`` positions of a group hold what is kept, the others what
was removed. A removal swaps removed structures with kept ones from behind the new width, so that both stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gisp_kernels.ops.swap import IntArray


@dataclass(frozen=True)
class Change:
    """What one step does.

    Attributes:
        groups: numbers of the groups that lose structures, ascending.
        before, after: kept structures of each of them.
        pairs: int64 [n, 2], positions to swap over all groups; those of one group lie together, all differ.
        first: for each of ``groups`` the first of its pairs, and the end.
    """

    groups: IntArray
    before: IntArray
    after: IntArray
    pairs: IntArray = field(repr=False)
    first: IntArray


class Ordering:
    """Positions of the structures of groups.

    Args:
        counts: group name -> number of structures.

    Attributes:
        names: of the groups.
        start: int64 [groups + 1], where the numbers of each group begin.
        order: int64 [all], structure at every position.
        kept: structures kept in every group.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.names = list(counts)
        self.number = {name: i for i, name in enumerate(self.names)}
        self.start: IntArray = np.concatenate(([0], np.cumsum(np.array(list(counts.values()), dtype=np.int64))))
        self.order: IntArray = np.arange(self.start[-1])
        self.kept: list[int] = list(counts.values())
        self._position = self.order.copy()
        self._marked = np.zeros(len(self.order), dtype=bool)

    def span(self, group: int) -> slice:
        """Positions of a group."""
        return slice(int(self.start[group]), int(self.start[group + 1]))

    def group(self, name: str) -> int:
        """Number of a group.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self.number:
            raise ValueError(f"no group is named {name!r}; there are {len(self.names)}: {_some(self.names)}")
        return self.number[name]

    def plan(self, removals: Mapping[str, torch.Tensor | Sequence[int]]) -> Change:
        """The swaps that bring structures behind the kept ones; nothing is changed yet.

        Args:
            removals: group name -> indices within the group, in any order.

        Raises:
            ValueError: an unknown group, or an index that is out of range, repeated or already removed.
        """
        given = {self.group(name): _index_array(name, index) for name, index in removals.items()}
        groups = np.array(sorted(g for g, index in given.items() if len(index)), dtype=np.int64)
        if not len(groups):
            none = np.empty(0, dtype=np.int64)
            return Change(none, none, none, np.empty((0, 2), dtype=np.int64), np.zeros(1, dtype=np.int64))
        indices = [given[g] for g in groups.tolist()]
        taken = np.array([len(index) for index in indices])
        before = np.array([self.kept[g] for g in groups.tolist()])
        after = before - taken
        start = self.start[groups]
        positions = self._checked_positions(groups, np.concatenate(indices), taken, before)
        self._marked[positions] = True
        # Both sides ascend, so that the result depends on the set of indices only, not on how it was listed.
        leaving = np.sort(positions[positions < np.repeat(start + after, taken)])
        behind = np.repeat(start + after - (np.cumsum(taken) - taken), taken) + np.arange(len(positions))
        moving_in = behind[~self._marked[behind]]
        self._marked[positions] = False
        first = np.searchsorted(leaving, np.append(start, self.start[-1]))
        return Change(groups, before, after, np.stack((leaving, moving_in), axis=1), first)

    def swap(self, change: Change) -> None:
        """Carry out the swaps of a change, or undo them."""
        first, second = change.pairs[:, 0], change.pairs[:, 1]
        one, other = self.order[first], self.order[second]
        self.order[first], self.order[second] = other, one
        self._position[one], self._position[other] = second, first

    def _checked_positions(self, groups: IntArray, index: IntArray, taken: IntArray, before: IntArray) -> IntArray:
        """Positions of structures given by their index within the group."""
        start = np.repeat(self.start[groups], taken)
        total = np.repeat(self.start[groups + 1], taken) - start
        outside = np.flatnonzero((index < 0) | (index >= total))
        if len(outside):
            name = self._named(groups, taken, outside[0])
            raise ValueError(f"group {name!r} has {total[outside[0]]} structures, got index {index[outside[0]]}")
        positions = self._position[start + index]
        gone = np.flatnonzero(positions - start >= np.repeat(before, taken))
        if len(gone):
            name = self._named(groups, taken, gone[0])
            raise ValueError(f"structure {index[gone[0]]} of group {name!r} is already removed")
        ranked = np.sort(positions)
        if (ranked[1:] == ranked[:-1]).any():
            again = np.flatnonzero(positions == ranked[1:][ranked[1:] == ranked[:-1]][0])[0]
            name = self._named(groups, taken, again)
            raise ValueError(f"structure {index[again]} of group {name!r} is given more than once")
        return positions

    def _named(self, groups: IntArray, taken: IntArray, place: np.int64) -> str:
        return self.names[int(np.repeat(groups, taken)[place])]


def _index_array(name: str, index: torch.Tensor | Sequence[int]) -> IntArray:
    # One structure may be removed in each of a hundred groups: the common case must cost next to nothing.
    if not (isinstance(index, torch.Tensor) and index.dtype == torch.int64 and index.is_cpu and index.dim() == 1):
        index = torch.as_tensor(index, device="cpu")
        if index.numel() and (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool):
            raise ValueError(f"indices to remove from {name!r} must be integers, got {index.dtype}")
        if index.dim() != 1:
            shape = tuple(index.shape)
            raise ValueError(f"indices to remove from {name!r} must have one dimension, got shape {shape}")
        index = index.long()
    array: IntArray = index.numpy()
    return array


def _some(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:limit])) + (", ..." if len(listed) > limit else "")
