"""Compaction by partition: removed structures move behind the kept prefix of the same storage, and can come back.

Weights are never reallocated by a step. A Parameter becomes a view of the kept prefix (rows: contiguous; columns:
unchanged leading dimension), what was removed stays behind it until :meth:`Compactor.pack`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from gisp_kernels.checks import as_texts
from gisp_kernels.compaction.assembly import Assembly
from gisp_kernels.compaction.axis import Axis
from gisp_kernels.compaction.state import OptimizerState, watch_fused_optimizers
from gisp_kernels.compaction.store import Store, size_in_bytes
from gisp_kernels.groups import StructureGroup
from gisp_kernels.ops.swap import PreparedSwaps
from gisp_kernels.ordering import Change, Ordering


class Compactor:
    """Removes structures from the layers of groups in place, step by step, and brings them back.

    A group says which rows and columns (outputs and inputs) of which layers belong to one structure. The layers are of
    the kinds of :func:`gisp_kernels.layers.lines_of`. A layer may lose rows to one group and columns to another or the
    same. Several groups may share an axis of a layer if they name their lines by ``index``. A tied weight is changed
    once.

    Parameters stay the same objects in the same storage, with the same ``requires_grad``. If the width of a layer
    changes, its ``.grad`` is dropped, sizes that it keeps as attributes are updated, and the backward pass of a loss
    that was computed before is refused.

    The cost of a step is proportional to what it removes, if structures are blocks. Tensors whose lines are named by an
    ``index`` are rewritten; what is kept stays in the order of the lines.

    If a model is split over processes, groups of other processes have their weights on ``meta``. Their shapes and their
    order follow every step as if they were here.

    Args:
        groups: the groups, in a list or any other iterable. Their current weights are the full storage.
        backend: implementation of the swaps, see :class:`gisp_kernels.ops.swap.PreparedSwaps`.
        device: device of :attr:`numbers`; ``None``: that of the first weight.
        optimizer: one optimizer or several. Their state that has the shape of a parameter of the groups moves along
            with it. State may be created or loaded at any time. A structure that comes back has the state that it had
            when it was removed.

    Raises:
        TypeError: something else than groups, a layer of another kind, or something else than an optimizer.
        ValueError: two groups of one name, lines that two structures own or that cannot go alone, tensors that overlap
            or whose rows are not contiguous, or an optimizer that holds no parameter of the groups.
    """

    def __init__(
        self,
        groups: Iterable[StructureGroup],
        *,
        backend: str | None = None,
        device: torch.device | None = None,
        optimizer: Any | Sequence[Any] = (),
    ) -> None:
        self._backend = backend
        self._groups = _checked(groups)
        counts: dict[str, int] = {}
        for group in self._groups:
            if group.name in counts:
                raise ValueError(f"two groups are named {group.name!r}")
            counts[group.name] = group.count
        self._ordering = Ordering(counts)
        assembly = Assembly(self._groups)
        self._stores, self._axes = assembly.stores, assembly.axes
        watch_fused_optimizers()
        optimizers = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
        self._state = OptimizerState(optimizers, self._stores)
        if device is None:
            here = (store.full.device for store in self._stores if not store.full.is_meta)
            device = next(here, torch.device("cpu"))
        self._numbers = self._ordering.order.to(device, copy=True)
        self._prepared: list[PreparedSwaps] = []
        self._steps: list[Change] = []
        self._packed = False
        self._bind()
        # State comes and goes, and is taken over anew where it was replaced.
        self._own = self._held

    def __getstate__(self) -> dict[str, Any]:
        # Prepared swaps hold addresses of this storage.
        return {**self.__dict__, "_prepared": []}

    @property
    def depth(self) -> int:
        """Steps that can be rolled back."""
        return len(self._steps)

    def kept(self, name: str) -> int:
        """Structures kept in a group."""
        return self._ordering.kept[self._ordering.group(name)]

    def order(self, name: str) -> torch.Tensor:
        """Original index by current position, int64 CPU [original count]; the first :meth:`kept` are the kept ones."""
        return self._local_order(self._ordering.group(name))

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
        start = self._ordering.start[group]
        return slice(start, start + self._ordering.kept[group])

    def group(self, name: str) -> StructureGroup:
        """A group as it is now: one with an ``index`` has the lines of what is kept, by position."""
        number = self._ordering.group(name)
        group, kept = self._groups[number], self._ordering.kept
        current = []
        for projection, axis in zip(group.projections, self._axes[number], strict=True):
            index = projection.index
            if index is not None:
                index = axis.shown_at(kept)[index[: kept[number]].cpu()].to(index.device)
            current.append(dataclasses.replace(projection, index=index))
        return dataclasses.replace(group, projections=tuple(current))

    def storage(self, name: str) -> list[torch.Tensor]:
        """Weights and biases of a group with what was removed of them, projection after projection."""
        return [store.full for store in self._own[self._ordering.group(name)]]

    def house(self, name: str, storage: Sequence[torch.Tensor]) -> None:
        """Let a group live in other storage, of which its layers show as much as before; steps stay reversible.

        For a group that goes to another process, or comes from one. Its Parameters are new ones.

        Args:
            storage: contiguous tensors as of :meth:`storage`, of the same values or all on ``meta``.

        Raises:
            ValueError: other shapes or dtypes; nothing has changed then.
        """
        stores = self._own[self._ordering.group(name)]
        fits = len(storage) == len(stores) and all(
            new.shape == store.full.shape and new.dtype == store.full.dtype and new.is_contiguous()
            for new, store in zip(storage, stores, strict=True)
        )
        if not fits:
            raise ValueError(f"storage of group {name!r} must be contiguous, of its shapes and dtype")
        self._prepared = []
        for new, store in zip(storage, stores, strict=True):
            store.house(new.detach())

    def bytes_packed(self) -> int:
        """Bytes of what is kept: what the groups' storage takes after :meth:`pack`."""
        return sum(size_in_bytes(store.tensor) for store in self._stores)

    def bytes_storage(self) -> int:
        """Bytes the groups' storage takes now, kept and removed structures together."""
        return sum(size_in_bytes(store.full) for store in self._stores)

    @torch.inference_mode(False)
    @torch.no_grad()
    def remove(self, removals: Mapping[str, torch.Tensor | Sequence[int]]) -> None:
        """Remove structures as one step, also when there are none to remove.

        Args:
            removals: group name -> original indices, in any order.

        Raises:
            TypeError: no mapping of names to indices; nothing has changed then.
            ValueError: an unknown group, an index that is out of range, repeated or already removed, a layer whose
                weight was replaced from outside, or an optimizer's state that cannot follow. Nothing has changed then.
        """
        change = self._ordering.plan(removals)
        groups = change.groups
        self._check_shown(groups)
        self._follow_state()
        self._swap(change)
        self._set_kept(groups, change.after)
        self._steps.append(change)

    @torch.inference_mode(False)
    @torch.no_grad()
    def rollback(self, steps: int = 1) -> None:
        """Undo the last steps: weights, biases and order are bit for bit what they were.

        Raises:
            ValueError: ``steps`` is negative, a layer's weight was replaced from outside, or an optimizer's state
                cannot follow.
            RuntimeError: fewer steps can be undone; nothing has changed then.
        """
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        if steps > self.depth:
            why = " since pack(), which gave up the weights removed before" if self._packed else ""
            raise RuntimeError(f"{steps} steps cannot be rolled back: only {self.depth} were taken{why}")
        self._check_shown(sorted({g for step in self._steps[self.depth - steps :] for g in step.groups}))
        self._follow_state()
        for _ in range(steps):
            change = self._steps[-1]
            self._swap(change)
            self._set_kept(change.groups, change.before)
            self._steps.pop()

    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(self, *, in_place: bool = False, groups: str | Iterable[str] | None = None) -> None:
        """Copy the kept parts to storage of their own and free the rest; steps so far can no longer be rolled back.

        One tensor is held twice at a time.

        Args:
            in_place: leave the kept parts in the storage they have, at its front and without gaps, and free nothing:
                for memory that is registered with a device, where what is read should be no more than what is kept.
            groups: name or names of the groups whose gaps ``in_place`` closes; ``None``: all. The others only give up
                what was removed and keep their strides, by which a device chooses its products.

        Raises:
            ValueError: a layer's weight was replaced from outside; nothing has changed then.
        """
        names = [group.name for group in self._groups] if groups is None else as_texts(groups)
        self._check_shown(range(len(self._axes)))
        self._follow_state()
        closed = {id(store) for name in names for store in self._held[self._ordering.group(name)]}
        # The prepared swaps hold on to the storage that is given up.
        self._prepared = []
        for store in (*self._stores, *self._state.stores):
            if not in_place:
                store.pack()
            elif id(store) in closed:
                store.tighten()
            else:
                store.narrow()
        for axis in dict.fromkeys(itertools.chain.from_iterable(self._axes)):
            axis.pack()
        self._steps.clear()
        self._packed = True

    def _bind(self) -> None:
        """Sort the stores by the axes they lie on and the groups that cut them."""
        self._prepared = []
        self._on: dict[Axis, list[tuple[Store, int]]] = {axis: [] for axes in self._axes for axis in axes}
        for store in (*self._stores, *self._state.stores):
            for dim, axis in store.axes.items():
                self._on[axis].append((store, dim))
        self._held = [list(dict.fromkeys(s for axis in axes for s, _ in self._on[axis])) for axes in self._axes]

    def _follow_state(self) -> None:
        if self._state.refresh():
            self._bind()

    def _check_shown(self, groups: Iterable[int]) -> None:
        for group in groups:
            for store in self._own[group]:
                if not store.is_shown():
                    raise ValueError(
                        f"the weight or bias of {store.place} was replaced from outside (moved, cast or reloaded): "
                        "make a new Compactor"
                    )

    def _swap(self, change: Change) -> None:
        if len(change.pairs):
            if not self._prepared:
                self._prepared = self._prepare()
            # The numbers on the device move in the same launch as the weights; they are entry 0.
            pairs = [{0: change.pairs}, *({} for _ in self._prepared[1:])]
            for group, shared in zip(change.groups, self._ordering.within_groups(change), strict=True):
                if len(shared):
                    for launch, i in self._entries[group]:
                        pairs[launch][i] = shared
            for prepared, own in zip(self._prepared, pairs, strict=True):
                prepared.run(own)
        self._ordering.swap(change)

    def _prepare(self) -> list[PreparedSwaps]:
        """Swaps of all tensors in one launch, and in a second one of those that are cut along two dimensions."""
        entries: list[list[tuple[torch.Tensor, str, int]]] = [[(self._numbers, "row", 1)], []]
        self._entries: list[list[tuple[int, int]]] = [[] for _ in self._axes]
        seen: set[Store] = set()
        for axis, lines in self._on.items():
            if not axis.swapped:
                continue
            (claim,) = axis.claims
            for store, dim in lines:
                if store.full.is_meta:
                    continue
                launch = int(store in seen)
                seen.add(store)
                tensor, name, width = store.blocks(dim)
                self._entries[claim.group].append((launch, len(entries[launch])))
                entries[launch].append((tensor, name, claim.block * width))
        return [PreparedSwaps(*map(list, zip(*e, strict=True)), backend=self._backend) for e in entries if e]

    def _set_kept(self, groups: list[int], counts: Iterable[int]) -> None:
        kept = self._ordering.kept
        for group, count in zip(groups, counts, strict=True):
            kept[group] = count
        for axis in dict.fromkeys(axis for group in groups for axis in self._axes[group]):
            axis.set_kept(kept)
            if not axis.swapped:
                source = axis.lay_out(self._local_order, kept)
                for store, dim in self._on[axis]:
                    store.lay_out(dim, source)
        for store in dict.fromkeys(store for group in groups for store in self._held[group]):
            store.show()

    def _local_order(self, group: int) -> torch.Tensor:
        span = self._ordering.span(group)
        return self._ordering.order[span] - span.start


def _checked(groups: Iterable[StructureGroup]) -> list[StructureGroup]:
    """The groups as a list.

    Raises:
        TypeError: something else than groups.
    """
    found = list(groups) if isinstance(groups, Iterable) else None
    other = groups if found is None else next((g for g in found if not isinstance(g, StructureGroup)), None)
    if found is None or other is not None:
        kind = type(other).__name__
        raise TypeError(f"groups must be StructureGroups, got {kind}: give an iterable of them, as iter_groups(model)")
    return found
