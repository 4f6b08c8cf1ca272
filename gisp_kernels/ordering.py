"""Who is where in partitioned groups: the plan of a removal, for all groups of a model at once, on the host.

Structures are numbered group after group. The first ``kept`` positions of a group hold what is kept, the others what
was removed. A removal swaps removed structures with kept ones from behind the new width, so that both stay together.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

# Planning stays on the host whatever torch's default device is.
_HOST = torch.device("cpu")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """No other threads for tensors of a few thousand numbers: to wake 64 that share cores takes milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Change:
    """What one step does.

    Attributes:
        groups: numbers of the groups that lose structures, ascending.
        before, after: kept structures of each of them.
        pairs: int64 CPU [n, 2], positions to swap over all groups; those of one group lie together, all differ.
        counts: pairs of each of ``groups``.
    """

    groups: list[int]
    before: list[int]
    after: list[int]
    pairs: torch.Tensor = field(repr=False)
    counts: list[int]


class Ordering:
    """Positions of the structures of groups.

    Args:
        counts: group name -> number of structures.

    Attributes:
        names: of the groups.
        start: where the numbers of each group begin, and the end of all.
        order: int64 CPU [all], structure at every position.
        kept: structures kept in every group.
    """

    # What is made in inference mode could not be changed outside of it.
    @torch.inference_mode(False)
    def __init__(self, counts: Mapping[str, int]) -> None:
        self.names = list(counts)
        self.number = {name: i for i, name in enumerate(self.names)}
        self.start = list(itertools.accumulate(counts.values(), initial=0))
        self.order = torch.arange(self.start[-1], device=_HOST)
        self.kept: list[int] = list(counts.values())
        self._position = self.order.clone()
        self._marked = torch.zeros(len(self.order), dtype=torch.bool, device=_HOST)

    def span(self, group: int) -> slice:
        """Positions of a group."""
        return slice(self.start[group], self.start[group + 1])

    def group(self, name: str) -> int:
        """Number of a group.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self.number:
            raise ValueError(f"no group is named {name!r}; there are {len(self.names)}: {_some(self.names)}")
        return self.number[name]

    @_one_thread()
    def plan(self, removals: Mapping[str, torch.Tensor | Sequence[int]]) -> Change:
        """The swaps that bring structures behind the kept ones; nothing is changed yet.

        Args:
            removals: group name -> indices within the group, in any order.

        Raises:
            TypeError: no mapping, or indices of another type.
            ValueError: an unknown group, or an index that is out of range, repeated or already removed.
        """
        if not isinstance(removals, Mapping):
            raise TypeError(f"removals must map names of groups to indices, got {type(removals).__name__}")
        given = {self.group(name): _host_index(name, index) for name, index in removals.items()}
        groups = sorted(g for g, index in given.items() if len(index))
        if not groups:
            return Change([], [], [], torch.empty((0, 2), dtype=torch.int64, device=_HOST), [])
        taken = [len(given[g]) for g in groups]
        before = [self.kept[g] for g in groups]
        after = [kept - gone for kept, gone in zip(before, taken, strict=True)]
        positions = self._checked_positions(groups, taken, torch.cat([given[g] for g in groups]))
        # The first position behind the new width of a structure's group, and where the group's places in the list end.
        borders = [self.start[g] + kept for g, kept in zip(groups, after, strict=True)]
        shift = [border - place for border, place in zip(borders, itertools.accumulate(taken, initial=0), strict=False)]
        border, offset = _spread([borders, shift], taken)
        self._marked[positions] = True
        # Both sides ascend, so that the result depends on the set of indices only, not on how it was listed.
        leaving = positions[positions < border].sort().values
        behind = offset + torch.arange(len(positions), device=_HOST)
        moving_in = behind[~self._marked[behind]]
        self._marked[positions] = False
        starts = torch.tensor([*(self.start[g] for g in groups), self.start[-1]], device=_HOST)
        counts = torch.searchsorted(leaving, starts).diff().tolist()
        return Change(groups, before, after, torch.stack((leaving, moving_in), dim=1), counts)

    @_one_thread()
    def swap(self, change: Change) -> None:
        """Carry out the swaps of a change, or undo them."""
        first, second = change.pairs.unbind(1)
        one, other = self.order[first], self.order[second]
        self.order[first], self.order[second] = other, one
        self._position[one], self._position[other] = second, first

    @_one_thread()
    def within_groups(self, change: Change) -> tuple[torch.Tensor, ...]:
        """For each of a change's groups its pairs as positions within the group, int64 CPU [n, 2]."""
        (starts,) = _spread([[self.start[g] for g in change.groups]], change.counts)
        return (change.pairs - starts[:, None]).split(change.counts)

    def _checked_positions(self, groups: list[int], taken: list[int], index: torch.Tensor) -> torch.Tensor:
        """Positions of structures given by their index within the group, ``taken`` of each group."""
        totals = [self.start[g + 1] - self.start[g] for g in groups]
        start, total, kept = _spread([[self.start[g] for g in groups], totals, [self.kept[g] for g in groups]], taken)

        def refuse(places: torch.Tensor, what: str) -> None:
            place = int(places.nonzero()[0])
            group = next(g for g, end in zip(groups, itertools.accumulate(taken), strict=True) if place < end)
            raise ValueError(what.format(name=self.names[group], index=int(index[place]), total=int(total[place])))

        outside = (index < 0) | (index >= total)
        if outside.any():
            refuse(outside, "group {name!r} has {total} structures, got index {index}")
        positions = self._position[start + index]
        gone = positions - start >= kept
        if gone.any():
            refuse(gone, "structure {index} of group {name!r} is already removed")
        ranked = positions.sort().values
        repeated = ranked[1:][ranked[1:] == ranked[:-1]]
        if len(repeated):
            refuse(positions == repeated[0], "structure {index} of group {name!r} is given more than once")
        return positions


def _spread(of_groups: list[list[int]], taken: list[int]) -> tuple[torch.Tensor, ...]:
    """Values of groups as int64 CPU [structures], each as often as structures are taken from its group."""
    values, repeats = torch.tensor(of_groups, device=_HOST), torch.tensor(taken, device=_HOST)
    return values.repeat_interleave(repeats, dim=1).unbind()


def _host_index(name: str, index: torch.Tensor | Sequence[int]) -> torch.Tensor:
    # One structure may be removed in each of a hundred groups: the common case must cost next to nothing.
    if not (isinstance(index, torch.Tensor) and index.dtype == torch.int64 and index.is_cpu and index.dim() == 1):
        try:
            index = torch.as_tensor(index, device="cpu")
        except (TypeError, RuntimeError, ValueError):
            kind = type(index).__name__
            raise TypeError(f"indices to remove from {name!r} must be a tensor or a list, got {kind}") from None
        if index.numel() and (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool):
            raise ValueError(f"indices to remove from {name!r} must be integers, got {index.dtype}")
        if index.dim() != 1:
            shape = tuple(index.shape)
            raise ValueError(f"indices to remove from {name!r} must have one dimension, got shape {shape}")
        index = index.long()
    return index


def _some(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:limit])) + (", ..." if len(listed) > limit else "")
