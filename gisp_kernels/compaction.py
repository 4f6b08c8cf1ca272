"""Compaction by partition: removed structures move behind the kept prefix of the same storage, and can come back.

Weights are never reallocated by a step. A Parameter becomes a view of the kept prefix (rows: contiguous; columns:
unchanged leading dimension), what was removed stays behind it until :meth:`Compactor.pack`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gisp_kernels.groups import Projection, StructureGroup
from gisp_kernels.partition import swap_blocks_


@dataclass
class _Store:
    """One projection with the storage it owns, kept and removed structures together."""

    projection: Projection
    weight: torch.Tensor
    bias: torch.Tensor | None

    @staticmethod
    def of(projection: Projection) -> _Store:
        linear = projection.linear
        has_bias = projection.axis == "row" and linear.bias is not None
        return _Store(projection, linear.weight.detach(), linear.bias.detach() if has_bias else None)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def narrow(self, count: int) -> None:
        """Show the first ``count`` structures in the layer."""
        linear, extent = self.projection.linear, count * self.projection.block
        if self.projection.axis == "row":
            _show(linear.weight, self.weight[:extent])
            linear.out_features = extent
        else:
            _show(linear.weight, self.weight[:, :extent])
            linear.in_features = extent
        if self.bias is not None:
            _show(linear.bias, self.bias[:extent])

    def pack(self) -> None:
        """Copy what the layer shows to storage of its own, where it does not fill its storage already."""
        linear = self.projection.linear
        self.weight = _tight(linear.weight)
        if self.bias is not None:
            self.bias = _tight(linear.bias)

    def is_shown(self, count: int) -> bool:
        """Whether the layer still shows the first ``count`` structures of this storage."""
        linear, extent = self.projection.linear, count * self.projection.block
        dim = 0 if self.projection.axis == "row" else 1
        shown = [(linear.weight, self.weight, dim)]
        if self.bias is not None:
            if linear.bias is None:
                return False
            shown.append((linear.bias, self.bias, 0))
        return all(_is_prefix(view.detach(), full, axis, extent) for view, full, axis in shown)


@dataclass
class _State:
    """One group: where every structure is."""

    group: StructureGroup
    stores: list[_Store]
    order: torch.Tensor
    position: torch.Tensor
    kept: int

    def swap(self, pairs: torch.Tensor) -> None:
        first, second = pairs[:, 0], pairs[:, 1]
        held = self.order[first]
        self.order[first] = self.order[second]
        self.order[second] = held
        self.position[self.order[first]] = first
        self.position[self.order[second]] = second


@dataclass(frozen=True)
class _Change:
    """What one step did to one group."""

    before: int
    after: int
    pairs: torch.Tensor = field(repr=False)


class Compactor:
    """Removes structures from the Linear layers of groups in place, step by step, and brings them back.

    The Parameter objects, their ``requires_grad`` and their storage stay; ``.grad`` of a layer whose width changes is
    dropped, because it belongs to the other width. ``in_features`` and ``out_features`` follow the weight.

    Args:
        groups: the groups; their current weights are the full storage.
        backend: of the swaps, see :func:`gisp_kernels.partition.swap_blocks_`.

    Raises:
        ValueError: two groups of one name, a weight that appears twice (a tied weight would be swapped twice), or a
            weight whose rows are not contiguous.
    """

    def __init__(self, groups: Sequence[StructureGroup], *, backend: str | None = None) -> None:
        self._backend = backend
        self._states: dict[str, _State] = {}
        self._steps: list[dict[str, _Change]] = []
        self._packed = False
        for group in groups:
            if group.name in self._states:
                raise ValueError(f"two groups are named {group.name!r}")
            stores = [_Store.of(p) for p in group.projections]
            index = torch.arange(group.count)
            self._states[group.name] = _State(group, stores, index, index.clone(), group.count)
        self._check_stores()

    @property
    def depth(self) -> int:
        """Steps that can be rolled back."""
        return len(self._steps)

    def kept(self, name: str) -> int:
        """Structures kept in a group."""
        return self._state(name).kept

    def order(self, name: str) -> torch.Tensor:
        """Original index by current position, int64 CPU [original count]; the first :meth:`kept` are the kept ones."""
        return self._state(name).order.clone()

    def bytes_packed(self) -> int:
        """Bytes of what is kept: what the groups' storage takes after :meth:`pack`."""
        return sum(_bytes(t) for store in self._stores() for t in _parameters(store))

    def bytes_storage(self) -> int:
        """Bytes the groups' storage takes now, kept and removed structures together."""
        return sum(_bytes(t) for store in self._stores() for t in store.tensors)

    @torch.no_grad()
    def remove(self, removals: Mapping[str, torch.Tensor | Sequence[int]]) -> None:
        """Remove structures as one step, also when there are none to remove.

        Args:
            removals: group name -> original indices, in any order.

        Raises:
            ValueError: an unknown group, an index that is out of range, repeated or already removed, or a layer whose
                weight was replaced from outside. Nothing has changed then.
        """
        indices = {name: self._check_indices(name, index) for name, index in removals.items()}
        changes = {name: self._plan(name, index) for name, index in indices.items() if index.numel()}
        self._check_shown(changes)
        self._swap(changes)
        for name, change in changes.items():
            self._set_kept(name, change.after)
        self._steps.append(changes)

    @torch.no_grad()
    def rollback(self, steps: int = 1) -> None:
        """Undo the last steps: weights, biases and order are bit for bit what they were.

        Raises:
            ValueError: ``steps`` is negative, or a layer's weight was replaced from outside.
            RuntimeError: fewer steps can be undone; nothing has changed then.
        """
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        if steps > self.depth:
            why = " since pack(), which gave up the weights removed before" if self._packed else ""
            raise RuntimeError(f"{steps} steps cannot be rolled back: only {self.depth} were taken{why}")
        self._check_shown({name for step in self._steps[self.depth - steps :] for name in step})
        for _ in range(steps):
            changes = self._steps[-1]
            self._swap(changes)
            for name, change in changes.items():
                self._set_kept(name, change.before)
            self._steps.pop()

    @torch.no_grad()
    def pack(self) -> None:
        """Copy the kept parts to storage of their own and free the rest; steps so far can no longer be rolled back.

        Raises:
            ValueError: a layer's weight was replaced from outside; nothing has changed then.
        """
        self._check_shown(self._states)
        for store in self._stores():
            store.pack()
        self._steps.clear()
        self._packed = True

    def _state(self, name: str) -> _State:
        if name not in self._states:
            raise ValueError(f"no group is named {name!r}; there are {len(self._states)}: {_some(self._states)}")
        return self._states[name]

    def _stores(self) -> list[_Store]:
        return [store for state in self._states.values() for store in state.stores]

    def _check_stores(self) -> None:
        spans: list[tuple[str, int, int, str]] = []
        for name, state in self._states.items():
            for i, store in enumerate(state.stores):
                place = f"projection {i} of group {name!r}"
                weight = store.weight
                if weight.dim() != 2 or weight.layout != torch.strided or weight.is_meta:
                    found = f"{weight.layout} {tuple(weight.shape)} on {weight.device}"
                    raise ValueError(f"the weight of {place} must be a dense matrix with memory, got {found}")
                if weight.shape[1] > 1 and weight.stride(1) != 1:
                    raise ValueError(f"rows of the weight of {place} must be contiguous, got strides {weight.stride()}")
                spans += [(str(t.device), t.data_ptr(), _end(t), place) for t in store.tensors if t.numel()]
        spans.sort()
        for one, other in itertools.pairwise(spans):
            if one[0] == other[0] and other[1] < one[2]:
                raise ValueError(f"{one[3]} and {other[3]} share memory: a tied weight cannot be compacted")

    def _check_indices(self, name: str, index: torch.Tensor | Sequence[int]) -> torch.Tensor:
        state = self._state(name)
        given = torch.as_tensor(index, device="cpu")
        if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
            raise ValueError(f"indices to remove from {name!r} must be integers, got {given.dtype}")
        if given.dim() != 1:
            raise ValueError(f"indices to remove from {name!r} must have one dimension, got shape {tuple(given.shape)}")
        given = given.long()
        total = state.order.numel()
        outside = given[(given < 0) | (given >= total)]
        if outside.numel():
            raise ValueError(f"group {name!r} has {total} structures, got index {int(outside[0])}")
        gone = given[state.position[given] >= state.kept]
        if gone.numel():
            raise ValueError(f"structure {int(gone[0])} of group {name!r} is already removed")
        repeats = torch.bincount(given, minlength=1)
        if int(repeats.max()) > 1:
            raise ValueError(f"structure {int(repeats.argmax())} of group {name!r} is given more than once")
        return given

    def _plan(self, name: str, index: torch.Tensor) -> _Change:
        state = self._state(name)
        after = state.kept - index.numel()
        removed = torch.zeros(state.kept, dtype=torch.bool)
        removed[state.position[index]] = True
        # Ascending on both sides: the result depends on the set of indices only, not on how it was listed.
        leaving = removed[:after].nonzero().flatten()
        moving_in = (~removed[after:]).nonzero().flatten() + after
        return _Change(state.kept, after, torch.stack((leaving, moving_in), dim=1))

    def _check_shown(self, names: Iterable[str]) -> None:
        for name in names:
            state = self._state(name)
            for i, store in enumerate(state.stores):
                if not store.is_shown(state.kept):
                    raise ValueError(
                        f"the weight or bias of projection {i} of group {name!r} was replaced from outside "
                        "(moved, cast or reloaded): make a new Compactor"
                    )

    def _swap(self, changes: Mapping[str, _Change]) -> None:
        work = [
            (tensor, change.pairs, store.projection.axis, store.projection.block)
            for name, change in changes.items()
            for store in self._states[name].stores
            for tensor in store.tensors
        ]
        if work:
            tensors, pairs, axes, blocks = zip(*work, strict=True)
            swap_blocks_(tensors, pairs, axes, blocks, backend=self._backend)
        for name, change in changes.items():
            self._states[name].swap(change.pairs)

    def _set_kept(self, name: str, count: int) -> None:
        state = self._states[name]
        state.kept = count
        for store in state.stores:
            store.narrow(count)


def _show(parameter: torch.Tensor, view: torch.Tensor) -> None:
    if parameter.shape != view.shape:
        parameter.grad = None
    parameter.data = view


def _tight(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's data, made to fill its storage.

    What is returned shares the parameter's version counter, so that autograd notices a later swap in a saved weight.
    """
    data = parameter.detach()
    if not (data.is_contiguous() and data.untyped_storage().nbytes() == _bytes(data)):
        _show(parameter, data.clone(memory_format=torch.contiguous_format))
    return parameter.detach()


def _parameters(store: _Store) -> list[torch.Tensor]:
    linear = store.projection.linear
    return [linear.weight] if store.bias is None else [linear.weight, linear.bias]


def _is_prefix(view: torch.Tensor, full: torch.Tensor, dim: int, extent: int) -> bool:
    return (
        view.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()
        and view.storage_offset() == full.storage_offset()
        and view.dtype == full.dtype
        and view.shape == full.narrow(dim, 0, extent).shape
        and view.stride() == full.stride()
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _end(tensor: torch.Tensor) -> int:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _some(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:limit])) + (", ..." if len(listed) > limit else "")
