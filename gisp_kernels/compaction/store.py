"""One tensor with the storage it owns: lines that are kept in front, and behind them what was removed."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch

from gisp_kernels.compaction.axis import Axis

# Bytes of an int64.
_WORD = 8
# Bytes copied aside at a time where rows move up within their storage.
_MOVED = 2**26
_INNER_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Store:
    """A parameter, buffer or optimizer state, of which its owners show the lines kept.

    Args:
        tensor: all of it; it becomes a view of what is kept and stays the same object.
        owner, name: the mapping that holds the tensor, and under which name.
        place: the layer, for messages.

    Attributes:
        owners: all mappings that hold the tensor, and its name there.
        axes: dimension -> its lines.
        full: kept and removed together.
    """

    def __init__(self, tensor: torch.Tensor, owner: MutableMapping[str, Any], name: str, place: str) -> None:
        self.tensor = tensor
        self.owners = [(owner, name)]
        self.axes: dict[int, Axis] = {}
        self.place = place
        self._take(tensor.detach())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shown": self._shown if self.is_shown() else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Show storage of its own, in a copy of the layers or in layers that were pickled."""
        self.__dict__.update(state)
        if state["_shown"] is not None:
            self._take(self.full)
            self.show()

    def __str__(self) -> str:
        return f"{self.owners[0][1]} of {self.place}"

    def check(self) -> None:
        """Refuse memory in which the axes' lines cannot move.

        Raises:
            ValueError: the tensor has no memory, or its lines do not lie in blocks.
        """
        full = self.full
        if full.layout != torch.strided or full.is_meta:
            found = f"{full.layout} {tuple(full.shape)} on {full.device}"
            raise ValueError(f"the {self} must be a dense tensor with memory, got {found}")
        for dim, axis in self.axes.items():
            if axis.swapped:
                self.blocks(dim)

    def blocks(self, dim: int) -> tuple[torch.Tensor, str, int]:
        """The full storage as a matrix or vector, the axis on which lines of ``dim`` lie there, and a line's width.

        Raises:
            ValueError: lines do not lie in blocks of this memory.
        """
        full = self.full
        if full.dim() <= 2:
            if full.shape[-1] > 1 and full.stride(-1) != 1:
                raise ValueError(f"rows of the {self} must be contiguous, got strides {full.stride()}")
            return full, ("row", "column")[dim], 1
        rows, inner = full.shape[0], math.prod(full.shape[1:])
        pitch = max(full.stride(0), inner)
        kernel = math.prod(full.shape[2:])
        if full[:1].is_contiguous():
            matrix = full.as_strided((rows, inner), (pitch, 1))
            return matrix, ("row", "column")[dim], 1 if dim == 0 else kernel
        if _INNER_LAST.get(full.dim()) and full[:1].is_contiguous(memory_format=_INNER_LAST[full.dim()]):
            if dim == 0:
                return full.as_strided((rows, inner), (pitch, 1)), "row", 1
            if pitch == inner:
                return full.as_strided((rows * kernel, full.shape[1]), (full.shape[1], 1)), "column", 1
        raise ValueError(f"the {self} must be contiguous, got strides {full.stride()} for {tuple(full.shape)}")

    def show(self) -> None:
        """Show what the axes say is kept."""
        tensor, view = self.tensor, self._shown_part()
        if tensor.shape != view.shape:
            if tensor.grad is not None:
                tensor.grad = None
            if tensor.requires_grad:
                _forget_graphs(tensor)
        tensor.data = view
        self._shown = view.shape

    def follower(self, owner: MutableMapping[str, Any], name: str, earlier: Store | None) -> Store:
        """A store of a tensor whose lines are those of this one, an optimizer's state.

        What was removed before the tensor came is taken from an earlier store of the same name, or zero.

        Args:
            owner, name: mapping that holds the tensor, of the shape shown, and its name there.
        """
        tensor: torch.Tensor = owner[name]
        follower = Store(tensor, owner, name, f"{self}, state {name!r},")
        follower.axes = self.axes
        if earlier is None and tensor.shape == self.full.shape:
            try:
                follower.check()
                return follower
            except ValueError:
                pass
        full = torch.zeros_like(self.full, dtype=tensor.dtype, device=tensor.device)
        if earlier is not None:
            full.copy_(earlier.full)
        follower._take(full)
        follower._shown_part().copy_(tensor)
        follower.show()
        return follower

    def is_shown(self) -> bool:
        """Whether the owners still show this storage as :meth:`show` left it."""
        tensor = self.tensor
        for owner, name in self.owners:
            if owner.get(name) is not tensor:
                return False
        if tensor.shape != self._shown or tensor.stride() != self._stride or tensor.dtype != self._dtype:
            return False
        # A tensor without elements has no address of its own.
        if tensor.numel():
            return tensor.data_ptr() == self._address
        return tensor.untyped_storage().data_ptr() == self.full.untyped_storage().data_ptr()

    def lay_out(self, dim: int, source: torch.Tensor) -> None:
        """Bring lines to new places; ``source`` int64 CPU [lines]: where each comes from."""
        self.full.copy_(self.full.index_select(dim, source.to(self.full.device)))

    def house(self, full: torch.Tensor) -> None:
        """Own another storage of the same shape, of which the owners show as much as before in a new Parameter."""
        requires_grad = self.tensor.requires_grad
        self._take(full)
        shown = self._shown_part()
        self.tensor = torch.nn.Parameter(shown, requires_grad=requires_grad)
        self._shown = shown.shape
        for owner, name in self.owners:
            owner[name] = self.tensor

    def pack(self) -> None:
        """Copy what is shown to storage of its own, where it does not fill its storage already.

        The storage shares the tensor's version counter, so that autograd notices a later swap in a saved weight.
        """
        data = self.tensor.detach()
        if data.untyped_storage().nbytes() != size_in_bytes(data):
            form = _INNER_LAST.get(data.dim()) if self._inner_last() else None
            words = data if form else _in_words(data)
            self.tensor.data = words.clone(memory_format=form or torch.contiguous_format).view(data.dtype)
        self._take(self.tensor.detach())

    def tighten(self) -> None:
        """Move what is shown to the front of its own storage, without gaps."""
        data = self.tensor.detach()
        form = _INNER_LAST[data.dim()] if self._inner_last() else torch.contiguous_format
        if not data.is_contiguous(memory_format=form):
            matrix = data.movedim(1, -1).view(-1, data.shape[1]) if self._inner_last() else data.view(len(data), -1)
            rows, width = matrix.shape
            tight = matrix.as_strided((rows, width), (width, 1))
            count = max(1, _MOVED // max(1, width * data.element_size()))
            for start in range(0, rows, count):
                # Rows end before those that are still to be read begin.
                tight[start : start + count] = matrix[start : start + count].clone()
            torch.autograd.graph.increment_version(self.full)
            strides = torch.empty(data.shape, device="meta", memory_format=form).stride()
            self.tensor.data = data.as_strided(data.shape, strides)
        self._take(self.tensor.detach())

    def narrow(self) -> None:
        """Give up what is not shown, and leave what is where it lies."""
        self._take(self.tensor.detach())

    def _shown_part(self) -> torch.Tensor:
        part = self.full
        for dim, axis in self.axes.items():
            part = part.narrow(dim, 0, axis.extent)
        return part

    def _inner_last(self) -> bool:
        form = _INNER_LAST.get(self.full.dim())
        return form is not None and not self.full.is_contiguous() and self.full.is_contiguous(memory_format=form)

    def _take(self, full: torch.Tensor) -> None:
        self.full = full
        self._address = full.data_ptr()
        self._shown, self._stride, self._dtype = full.shape, full.stride(), full.dtype


def size_in_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _forget_graphs(parameter: torch.Tensor) -> None:
    """Have graphs built so far refuse a backward pass, and coming ones not be bound to the shape of theirs.

    All graphs over a parameter share the node that accumulates its gradient while one of them lives, and it holds
    on to the shape. A new dtype is what makes torch give a parameter a node of its own again.
    """
    with torch.enable_grad():
        view = parameter.view_as(parameter).grad_fn
    node = None if view is None else view.next_functions[0][0]
    assert node is not None
    node.register_prehook(_refuse_graph)
    other = torch.float32 if parameter.dtype == torch.float16 else torch.float16
    parameter.data = parameter.detach().new_empty(0, dtype=other)


def _refuse_graph(_: Any) -> None:
    raise RuntimeError(
        "this loss was computed before structures were removed or brought back: run the forward pass again"
    )


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
