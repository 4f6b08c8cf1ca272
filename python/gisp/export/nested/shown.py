"""Parameters of a model that show what one size of a nested checkpoint keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gisp.export.nested.files import NestedFiles
from gisp.export.nested.order import milestone_name
from gisp.export.nested.own import OwnRows

# Stands for the weights that all sizes share where a milestone's step stands for its own.
_SHARED = 0


class ShownRows:
    """One weight or bias of which the layer shows a prefix, or the rows of a milestone.

    Rows of storage are structures' rows; a weight whose columns belong to structures is shown transposed.
    """

    def __init__(
        self, linear: nn.Linear, part: str, columns: bool, stored: str, nothing: torch.Tensor, own: OwnRows | None
    ) -> None:
        """
        Args:
            columns: whether structures lie along the columns of the weight.
            nothing: no rows of storage, of its dtype and on its device.
            own: rows that milestones have in place of the shared ones.
        """
        self._linear, self._part, self._columns, self._stored, self._own = linear, part, columns, stored, own
        self._rest = nothing.shape[1:]
        self._source = _SHARED
        # Rows in memory that are not shown, by where they are from.
        self._aside: dict[int, torch.Tensor] = {}
        # Rows in memory, and where they are; a parameter found elsewhere was moved by somebody and is tight.
        self._set(nothing)

    def show(self, rows: int, step: int, files: NestedFiles, keep_memory: bool) -> None:
        """Show the first ``rows`` rows of what a step has, reading those not in memory.

        What other rows replace stays in memory until :meth:`release`: going back reads nothing.
        """
        if self.replaced_at(step):
            self._replace(self._source_at(step))
        held = self._held()
        if rows > len(held):
            more = self._read(len(held), rows, files)
            self._set(torch.cat((held, more.to(held.device, held.dtype))))
        elif keep_memory or rows == len(held):
            self._set(held[:rows], len(held))
        else:
            self._set(held[:rows].clone())

    def replaced_at(self, step: int) -> bool:
        """Whether a step has other rows than those shown, not more or fewer of them."""
        return self._source_at(step) != self._source

    def release(self) -> None:
        """Give back the memory of rows that others replaced."""
        self._aside.clear()

    def _source_at(self, step: int) -> int:
        return step if self._own is not None and step in self._own.steps else _SHARED

    def _replace(self, source: int) -> None:
        """Rows of another source that are in memory, or none, in place of those shown."""
        former = self._held()
        self._aside[self._source] = former
        found = self._aside.pop(source, None)
        if found is None or found.dtype != former.dtype:
            found = former.new_empty(0, *self._rest)
        self._linear._parameters[self._part].grad = None  # type: ignore[union-attr]
        self._source = source
        self._set(found.to(former.device))

    def _read(self, start: int, stop: int, files: NestedFiles) -> torch.Tensor:
        if self._own is None or self._source == _SHARED:
            return files.rows(self._stored, start, stop)
        return self._own.read(self._source, stop)[start:]

    def _held(self) -> torch.Tensor:
        """All rows in memory, shown or not."""
        data = self._linear._parameters[self._part].data  # type: ignore[union-attr]
        shown = data.t() if self._columns else data
        if _place(shown) != self._place:
            return shown
        return shown.as_strided((self._rows, *self._rest), shown.stride())

    def _set(self, shown: torch.Tensor, rows: int | None = None) -> None:
        linear: Any = self._linear
        value = shown.t() if self._columns else shown
        parameter = linear._parameters[self._part]
        if parameter.is_meta:
            parameter = linear._parameters[self._part] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        else:
            if parameter.shape != value.shape:
                parameter.grad = None
            parameter.data = value
        self._rows, self._place = len(shown) if rows is None else rows, _place(shown)
        if self._part == "weight":
            linear.out_features, linear.in_features = value.shape


class ShownBias:
    """The bias [D] of an output projection of which milestones have their own; elsewhere the dense model's, or none.

    Values are small: those read stay in memory.
    """

    def __init__(self, linear: nn.Linear, owner: str, files: NestedFiles) -> None:
        self._linear = linear
        shared = f"{owner}.bias"
        self._names = {step: milestone_name(step, shared) for step in files.milestones}
        self._names = {step: name for step, name in self._names.items() if files.holds(name)}
        self._values = {_SHARED: None if linear.bias is None else files.rows(shared, 0, linear.out_features)}
        self._source = _SHARED

    def show(self, step: int, files: NestedFiles) -> None:
        """Show the bias of a step."""
        source = step if step in self._names else _SHARED
        if source == self._source:
            return
        if source not in self._values:
            self._values[source] = files.rows(self._names[source], 0, self._linear.out_features)
        value, weight, bias = self._values[source], self._linear.weight, self._linear.bias
        if value is None:
            self._linear.bias = None
        elif bias is None:
            self._linear.bias = nn.Parameter(value.to(weight, copy=True), requires_grad=weight.requires_grad)
        else:
            bias.data, bias.grad = value.to(weight, copy=True), None
        self._source = source


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of the storage; a view without rows has no address of its own."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
