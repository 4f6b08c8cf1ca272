"""From groups to the tensors that hold them: which lines of which storage every group cuts."""

from __future__ import annotations

import itertools
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from gisp_kernels.checks import memory_span
from gisp_kernels.compaction.axis import Axis, Claim
from gisp_kernels.compaction.store import Store
from gisp_kernels.groups import Projection, StructureGroup
from gisp_kernels.layers import Lines, lines_of


class Assembly:
    """Stores and axes of groups.

    A tensor may be cut on both its axes, by one group or two, and by several groups that own different lines of one
    axis. A tied tensor has one store.

    Attributes:
        stores: of all tensors.
        axes: for every group the axes its projections cut.

    Raises:
        TypeError: a layer of a kind that cannot be cut.
        ValueError: lines that cannot be cut, or that two groups cut; tensors that share memory.
    """

    def __init__(self, groups: Sequence[StructureGroup]) -> None:
        self._stores: dict[int, Store] = {}
        self._axes: dict[tuple[int, int], Axis] = {}
        self.axes: list[list[Axis]] = []
        for number, group in enumerate(groups):
            self.axes.append(
                [
                    self._add(number, projection, f"projection {i} of group {group.name!r}")
                    for i, projection in enumerate(group.projections)
                ]
            )
        self.stores = list(self._stores.values())
        _check_memory(self.stores, self.axes)

    def _add(self, group: int, projection: Projection, place: str) -> Axis:
        layer: nn.Module = projection.linear
        if projection.axis == "element" or projection.parameter != "weight":
            what = f"{projection.axis}s of {projection.parameter!r}"
            raise ValueError(f"{place}: only rows and columns of a layer's weight can be removed in place, got {what}")
        try:
            lines = lines_of(layer, projection.axis)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{place}: {error}") from None
        index = None if projection.index is None else projection.index.cpu()
        if lines.unit > 1 and (index is not None or projection.block % lines.unit):
            raise ValueError(f"{place}: a {type(layer).__name__} loses {lines.unit} rows at a time: give such a block")
        axis = self._axis(layer, lines, projection, place)
        axis.add(Claim(group, projection.block, index))
        axis.follow(layer, lines.sizes)
        return axis

    def _axis(self, layer: nn.Module, lines: Lines, projection: Projection, place: str) -> Axis:
        """The axis a layer's tensors lie on, new or that of a tied tensor."""
        found = [(*_owned(layer, name, place), name, dim) for name, dim in lines.tensors.items()]
        keys = [(id(tensor), dim) for _, tensor, _, dim in found] or [(id(layer), 0)]
        known = [self._axes[key] for key in keys if key in self._axes]
        axis = known[0] if known else Axis(lines.count, f"the {projection.axis}s of {place}")
        if any(other is not axis for other in known):
            raise ValueError(f"{place} shares tensors with two other layers: they cannot be cut together")
        self._axes.update(dict.fromkeys(keys, axis))
        for owner, tensor, name, dim in found:
            self._store(owner, tensor, name, place).axes[dim] = axis
        return axis

    def _store(self, owner: MutableMapping[str, Any], tensor: torch.Tensor, name: str, place: str) -> Store:
        store = self._stores.get(id(tensor))
        if store is None:
            store = self._stores[id(tensor)] = Store(tensor, owner, name, place)
        elif not any(known is owner and called == name for known, called in store.owners):
            store.owners.append((owner, name))
        return store


def _owned(layer: nn.Module, name: str, place: str) -> tuple[MutableMapping[str, Any], torch.Tensor]:
    """The mapping of a module that holds a tensor of its, and the tensor."""
    for owner in (layer._parameters, layer._buffers):
        tensor = owner.get(name)
        if tensor is not None:
            return owner, tensor
    raise ValueError(f"{place}: {name} of the {type(layer).__name__} is computed from other tensors: undo that first")


def _check_memory(stores: Sequence[Store], axes: Sequence[Sequence[Axis]]) -> None:
    """Require memory that does not overlap, but of groups that lie elsewhere: all of such a group is on ``meta``."""
    away: set[Store] = set()
    if any(not store.full.is_meta for store in stores) and any(store.full.is_meta for store in stores):
        for cut in axes:
            own = [store for store in stores if _on(store, cut)]
            if all(store.full.is_meta for store in own):
                away.update(own)
    spans = []
    for store in stores:
        if store in away:
            continue
        store.check()
        full = store.full
        if full.numel():
            spans.append((str(full.device), full.data_ptr(), _end(full), store.place))
    spans.sort()
    for one, other in itertools.pairwise(spans):
        if one[0] == other[0] and other[1] < one[2]:
            raise ValueError(f"{one[3]} and {other[3]} share memory: tensors that overlap cannot be compacted")


def _on(store: Store, axes: Sequence[Axis]) -> bool:
    return any(axis is other for axis in store.axes.values() for other in axes)


def _end(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() + memory_span(tensor) * tensor.element_size()
