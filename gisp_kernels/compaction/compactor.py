"""Compaction by partition: removed structures move behind the kept prefix of the same storage, and can come back.

Weights are never reallocated by a step. A Parameter becomes a view of the kept prefix (rows: contiguous; columns:
unchanged leading dimension), what was removed stays behind it until :meth:`Compactor.pack`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gisp_kernels.groups import Projection, StructureGroup
from gisp_kernels.ops.swap import PreparedSwaps
from gisp_kernels.ordering import Change, Ordering

# Bytes of an int64.
_WORD = 8
# Bytes copied aside at a time where rows move up within their storage.
_MOVED = 2**26


class _Store:
    """One weight or bias with the storage it owns, kept and removed structures together."""

    def __init__(self, projection: Projection, name: str) -> None:
        linear = projection.linear
        if projection.index is not None or projection.axis == "element" or not isinstance(linear, nn.Linear):
            raise ValueError(
                f"only blocks of rows or columns of an nn.Linear can be removed in place, got {projection.axis}s of a "
                f"{type(linear).__name__}" + ("" if projection.index is None else " by an index")
            )
        self.block = projection.block
        self.axis = projection.axis
        self.dim = 0 if projection.axis == "row" else 1
        self._linear: Any = linear
        self._name = name
        # The number of features that follows this tensor's extent; a bias leaves it to its weight.
        self._features = None if name == "bias" else ("out_features", "in_features")[self.dim]
        self.parameter: nn.Parameter = linear._parameters[name]  # type: ignore[assignment]
        self._take(self.parameter.detach())

    @staticmethod
    def of(projection: Projection) -> list[_Store]:
        has_bias = projection.axis == "row" and getattr(projection.linear, "bias", None) is not None
        return [_Store(projection, name) for name in ("weight", "bias")[: 1 + has_bias]]

    def narrow(self, count: int) -> None:
        """Show the first ``count`` structures in the layer."""
        extent = count * self.block
        parameter, view = self.parameter, self.full.narrow(self.dim, 0, extent)
        if parameter.grad is not None and parameter.shape != view.shape:
            parameter.grad = None
        parameter.data = view
        if self._features is not None:
            # nn.Module's own attribute setting looks for parameters and modules first, at ten times the cost.
            object.__setattr__(self._linear, self._features, extent)

    def pack(self) -> None:
        """Copy what the layer shows to storage of its own, where it does not fill its storage already.

        The storage shares the parameter's version counter, so that autograd notices a later swap in a saved weight.
        """
        data = self.parameter.detach()
        if not (data.is_contiguous() and data.untyped_storage().nbytes() == _bytes(data)):
            self.parameter.data = _in_words(data).clone(memory_format=torch.contiguous_format).view(data.dtype)
        self._take(self.parameter.detach())

    def tighten(self) -> None:
        """Move what the layer shows to the front of its own storage, rows without a gap."""
        data = self.parameter.detach()
        if not data.is_contiguous():
            rows, width = data.shape
            tight = data.as_strided((rows, width), (width, 1))
            count = max(1, _MOVED // max(1, width * data.element_size()))
            for start in range(0, rows, count):
                # Rows end before those that are still to be read begin.
                tight[start : start + count] = data[start : start + count].clone()
            torch.autograd.graph.increment_version(self.full)
            self.parameter.data = tight
        self._take(self.parameter.detach())

    def is_shown(self, count: int) -> bool:
        """Whether the layer still shows the first ``count`` structures of this storage."""
        parameter = self.parameter
        if self._linear._parameters.get(self._name) is not parameter:
            return False
        shape, extent = parameter.shape, count * self.block
        if (
            shape[self.dim] != extent
            or len(shape) != len(self._shape)
            or (len(shape) == 2 and shape[1 - self.dim] != self._shape[1 - self.dim])
            or parameter.stride() != self._stride
            or parameter.dtype != self._dtype
        ):
            return False
        # A tensor without elements has no address of its own.
        if parameter.numel():
            return parameter.data_ptr() == self._address
        return parameter.untyped_storage().data_ptr() == self.full.untyped_storage().data_ptr()

    def _take(self, full: torch.Tensor) -> None:
        self.full = full
        self._address = full.data_ptr()
        self._shape, self._stride, self._dtype = full.shape, full.stride(), full.dtype


class Compactor:
    """Removes structures from the Linear layers of groups in place, step by step, and brings them back.

    The Parameter objects, their ``requires_grad`` and their storage stay; ``.grad`` of a layer whose width changes is
    dropped, because it belongs to the other width. ``in_features`` and ``out_features`` follow the weight.

    Args:
        groups: the groups; their current weights are the full storage.
        backend: of the swaps, see :func:`gisp_kernels.ops.swap.swap_blocks_`.
        device: of :attr:`numbers`; ``None``: that of the first weight.

    Raises:
        ValueError: two groups of one name, a weight that appears twice (a tied weight would be swapped twice), a
            weight whose rows are not contiguous, or structures that are no blocks of an ``nn.Linear``.
    """

    def __init__(
        self,
        groups: Sequence[StructureGroup],
        *,
        backend: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._backend = backend
        counts: dict[str, int] = {}
        for group in groups:
            if group.name in counts:
                raise ValueError(f"two groups are named {group.name!r}")
            counts[group.name] = group.count
        self._ordering = Ordering(counts)
        # Each group lists for each projection the weight and, for rows, its bias.
        self._stores = [[_Store.of(p) for p in group.projections] for group in groups]
        self._check_stores()
        self._flat_stores = [[s for stores in projections for s in stores] for projections in self._stores]
        if device is None:
            device = self._flat_stores[0][0].full.device if groups else torch.device("cpu")
        self._numbers = torch.from_numpy(self._ordering.order).to(device, copy=True)
        self._prepared: PreparedSwaps | None = None
        self._steps: list[Change] = []
        self._packed = False

    @property
    def depth(self) -> int:
        """Steps that can be rolled back."""
        return len(self._steps)

    def kept(self, name: str) -> int:
        """Structures kept in a group."""
        return self._ordering.kept[self._ordering.group(name)]

    def order(self, name: str) -> torch.Tensor:
        """Original index by current position, int64 CPU [original count]; the first :meth:`kept` are the kept ones."""
        group = self._ordering.group(name)
        span = self._ordering.span(group)
        return torch.from_numpy(self._ordering.order[span] - span.start)

    @property
    def numbers(self) -> torch.Tensor:
        """Structure at every position, int64 [all structures].

        Structures and positions are numbered group after group. Later steps change this tensor, in the launch that
        changes the weights: no step is waited for.
        """
        return self._numbers

    def kept_span(self, name: str) -> slice:
        """Positions of a group's kept structures in :attr:`numbers`."""
        group = self._ordering.group(name)
        start = int(self._ordering.start[group])
        return slice(start, start + self._ordering.kept[group])

    def bytes_packed(self) -> int:
        """Bytes of what is kept: what the groups' storage takes after :meth:`pack`."""
        return sum(_bytes(store.parameter) for stores in self._flat_stores for store in stores)

    def bytes_storage(self) -> int:
        """Bytes the groups' storage takes now, kept and removed structures together."""
        return sum(_bytes(store.full) for stores in self._flat_stores for store in stores)

    @torch.no_grad()
    def remove(self, removals: Mapping[str, torch.Tensor | Sequence[int]]) -> None:
        """Remove structures as one step, also when there are none to remove.

        Args:
            removals: group name -> original indices, in any order.

        Raises:
            ValueError: an unknown group, an index that is out of range, repeated or already removed, or a layer whose
                weight was replaced from outside. Nothing has changed then.
        """
        change = self._ordering.plan(removals)
        groups = change.groups.tolist()
        self._check_shown(groups)
        self._swap(change)
        self._set_kept(groups, change.after.tolist())
        self._steps.append(change)

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
        self._check_shown(sorted({g for step in self._steps[self.depth - steps :] for g in step.groups.tolist()}))
        for _ in range(steps):
            change = self._steps[-1]
            self._swap(change)
            self._set_kept(change.groups.tolist(), change.before.tolist())
            self._steps.pop()

    @torch.no_grad()
    def pack(self, *, in_place: bool = False) -> None:
        """Copy the kept parts to storage of their own and free the rest; steps so far can no longer be rolled back.

        One tensor is held twice at a time.

        Args:
            in_place: leave the kept parts in the storage they have, at its front and without gaps, and free nothing:
                for memory that is registered with a device, where what is read should be no more than what is kept.

        Raises:
            ValueError: a layer's weight was replaced from outside; nothing has changed then.
        """
        self._check_shown(range(len(self._flat_stores)))
        # The prepared swaps hold on to the storage that is given up.
        self._prepared = None
        for stores in self._flat_stores:
            for store in stores:
                store.tighten() if in_place else store.pack()
        self._steps.clear()
        self._packed = True

    def _check_stores(self) -> None:
        spans: list[tuple[str, int, int, str]] = []
        for name, projections in zip(self._ordering.names, self._stores, strict=True):
            for i, stores in enumerate(projections):
                place = f"projection {i} of group {name!r}"
                weight = stores[0].full
                if weight.dim() != 2 or weight.layout != torch.strided or weight.is_meta:
                    found = f"{weight.layout} {tuple(weight.shape)} on {weight.device}"
                    raise ValueError(f"the weight of {place} must be a dense matrix with memory, got {found}")
                if weight.shape[1] > 1 and weight.stride(1) != 1:
                    raise ValueError(f"rows of the weight of {place} must be contiguous, got strides {weight.stride()}")
                full = [store.full for store in stores]
                spans += [(str(t.device), t.data_ptr(), _end(t), place) for t in full if t.numel()]
        spans.sort()
        for one, other in itertools.pairwise(spans):
            if one[0] == other[0] and other[1] < one[2]:
                raise ValueError(f"{one[3]} and {other[3]} share memory: a tied weight cannot be compacted")

    def _check_shown(self, groups: Iterable[int]) -> None:
        for group in groups:
            kept = self._ordering.kept[group]
            for store in self._flat_stores[group]:
                if not store.is_shown(kept):
                    self._refuse(group, store)

    def _refuse(self, group: int, store: _Store) -> None:
        i = next(i for i, stores in enumerate(self._stores[group]) if store in stores)
        raise ValueError(
            f"the weight or bias of projection {i} of group {self._ordering.names[group]!r} was replaced from outside "
            "(moved, cast or reloaded): make a new Compactor"
        )

    def _swap(self, change: Change) -> None:
        if len(change.pairs):
            if self._prepared is None:
                self._prepared = self._prepare()
            starts = np.repeat(self._ordering.start[change.groups], np.diff(change.first))
            local = change.pairs - starts[:, None]
            # The numbers on the device move in the same launch as the weights; they are entry 0.
            pairs = {0: change.pairs}
            ends = change.first.tolist()
            for group, first, last in zip(change.groups.tolist(), ends, ends[1:], strict=False):
                if first < last:
                    shared = local[first:last]
                    for i in self._entries[group]:
                        pairs[i] = shared
            self._prepared.run(pairs)
        self._ordering.swap(change)

    def _prepare(self) -> PreparedSwaps:
        stores = [store for group in self._flat_stores for store in group]
        sizes = [len(group) for group in self._flat_stores]
        first = list(itertools.accumulate(sizes, initial=1))
        self._entries = [range(start, start + size) for start, size in zip(first, sizes, strict=False)]
        return PreparedSwaps(
            [self._numbers, *(store.full for store in stores)],
            ["row", *(store.axis for store in stores)],
            [1, *(store.block for store in stores)],
            backend=self._backend,
        )

    def _set_kept(self, groups: Iterable[int], counts: Iterable[int]) -> None:
        for group, count in zip(groups, counts, strict=True):
            self._ordering.kept[group] = count
            for store in self._flat_stores[group]:
                store.narrow(count)


def _in_words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as int64 where it can be read so: torch copies strided rows element by element."""
    size = tensor.element_size()
    places = (
        tensor.data_ptr(),
        *(size * n for n in (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])),
    )
    if tensor.dim() == 0 or tensor.stride(-1) != 1 or any(place % _WORD for place in places):
        return tensor
    return tensor.view(torch.int64)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _end(tensor: torch.Tensor) -> int:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()
