"""Groups of a dependency graph with line scores where its importance reads weights and gradients.

An importance of Torch-Pruning or LLM-Pruner sums products of a weight and its gradient over rows or columns. A layer
that stands in for the real one has sums of lines for a gradient and ones for a weight, so that all else is the peer's:
reductions, normalisers, biases, norms.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gisp_kernels.groups import Axis
from gisp_kernels.record.recorder import ImportanceRecorder


class _Item(tuple[Any, Any]):
    """(dependency, indices) of a group."""

    root_idxs: Any = None


@dataclass(frozen=True)
class Lines:
    """Scores of one weight [O, I].

    Attributes:
        scores: by axis: ``"row"`` [O] and ``"column"`` [I], or ``"element"`` [O, I].
        shape: of the weight.
    """

    scores: Mapping[str, torch.Tensor]
    shape: tuple[int, ...]

    @classmethod
    def of_gradient(cls, weight: torch.Tensor) -> Lines:
        """``W * G`` of every element, of the gradient that autograd left."""
        if weight.grad is None:
            raise RuntimeError("no backward pass was recorded: call loss.backward() inside record()")
        return cls({"element": (weight * weight.grad).detach()}, tuple(weight.shape))

    def divided(self, by: float) -> Lines:
        """All scores divided by a number."""
        return Lines({axis: scores / by for axis, scores in self.scores.items()}, self.shape)

    def of(self, axis: str) -> torch.Tensor:
        """[O, 1] of rows, [1, I] of columns, or of all elements [O, I]."""
        elements = self.scores.get("element")
        return self.scores[axis].unsqueeze(1 if axis == "row" else 0) if elements is None else elements


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of a model by name, but those that share their weight with another layer.

    The gradient of a shared weight is a sum over its uses, which stays in ``.grad``.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and owners[id(module.weight)] == 1
    }


def lines_of(recorder: ImportanceRecorder, linears: Mapping[str, nn.Linear], *axes: Axis) -> dict[nn.Module, Lines]:
    """Scores of layers along axes.

    Raises:
        RuntimeError: no backward pass was recorded.
    """
    if not recorder.backward_calls:
        raise RuntimeError("no backward pass was recorded: call loss.backward() inside record()")
    return {
        layer: Lines({axis: recorder.scores_of(layer, axis) for axis in axes}, tuple(layer.weight.shape))
        for layer in linears.values()
    }


def with_stand_ins(group: Any, show: Callable[[nn.Module, Any], nn.Module | None]) -> list[Any]:
    """A group's items with layers replaced where ``show(layer, handler)`` gives another."""
    items = []
    for number, (dependency, indices) in enumerate(group):
        shown = show(dependency.target.module, dependency.handler)
        if shown is not None:
            dependency = copy.copy(dependency)
            dependency.target = copy.copy(dependency.target)
            dependency.target.module = shown
        item = _Item((dependency, indices))
        item.root_idxs = getattr(group[number], "root_idxs", None)
        items.append(item)
    return items


def stand_in(layer: nn.Module, axis: str, scores: Mapping[str, Lines]) -> nn.Module:
    """A layer whose weight times gradient has the recorded sums over one axis.

    Args:
        layer: the real one; bias and everything else stay its own.
        axis: over whose lines the sums are.
        scores: by the attribute of the weight that they stand for, ``"grad"`` among them.

    Raises:
        RuntimeError: the layer changed its shape since it was recorded.
    """
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    grad = scores["grad"]
    if tuple(weight.shape) != grad.shape:
        raise RuntimeError(
            f"a {type(layer).__name__} of {tuple(weight.shape)} was {grad.shape} when it was recorded: record anew "
            "after a step"
        )
    parameter = nn.Parameter(torch.ones_like(grad.of(axis), dtype=torch.float32))
    for name, lines in scores.items():
        setattr(parameter, name, lines.of(axis).to(parameter.dtype))
    shown = copy.copy(layer)
    shown._parameters = {**layer._parameters, "weight": parameter}
    return shown
