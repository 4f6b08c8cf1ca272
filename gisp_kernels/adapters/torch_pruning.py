"""Taylor importance for Torch-Pruning (https://github.com/VainF/Torch-Pruning), without weight gradients.

::

    importance = TaylorImportance(model)
    pruner = tp.pruner.BasePruner(model, example_inputs, importance=importance, pruning_ratio=0.5)
    with importance.record():
        model(example_inputs).sum().backward()
    pruner.step()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn

from gisp_kernels.adapters.stand_in import Lines, linears_of, lines_of, stand_in, with_stand_ins
from gisp_kernels.record.importance import record_lines
from gisp_kernels.record.recorder import ImportanceRecorder

__all__ = ["TaylorImportance"]

_AXES = {tp.prune_linear_out_channels: "row", tp.prune_linear_in_channels: "column"}


class TaylorImportance(tp.importance.TaylorImportance):
    """Scores Linear layers by what :meth:`record` saw, everything else as Torch-Pruning does.

    Biases, convolutions, norms and weights with several owners keep their ``.grad`` and are scored by it. Scores are
    of the model as it was recorded: record once a step.

    Args:
        model: what will be pruned.
        mode: ``"exact"``: ``|W * G|`` with ``G`` summed over the backward passes of one :meth:`record`, as ``.grad``
            is, in a float32 buffer for each weight until :meth:`record` ends. ``"stream"``: ``|W * G|`` summed over
            backward passes, without a buffer; of one pass it is the same. ``multivariable`` needs no buffer.
        options: of ``tp.importance.TaylorImportance``.
    """

    def __init__(self, model: nn.Module, *, mode: Literal["exact", "stream"] = "exact", **options: Any) -> None:
        super().__init__(**options)
        self._model = model
        self._mode = mode
        self._lines: dict[nn.Module, Lines] | None = None

    @contextlib.contextmanager
    def record(self) -> Iterator[ImportanceRecorder]:
        """Record the backward passes of one pruning step.

        Raises:
            RuntimeError: (on leaving) there was no backward pass.
        """
        linears = linears_of(self._model)
        with record_lines(linears, mode="signed" if self.multivariable else self._mode) as recorder:
            yield recorder
        self._lines = lines_of(recorder, linears, "row", "column")

    def __call__(self, group: tp.dependency.Group) -> torch.Tensor | None:
        """Scores of a group's channels, as of Torch-Pruning's own importance.

        Raises:
            RuntimeError: nothing was recorded, or a layer changed its shape since then.
        """
        if self._lines is None:
            raise RuntimeError("nothing was recorded: call loss.backward() inside importance.record() first")
        scores: torch.Tensor | None = super().__call__(with_stand_ins(group, self._shown))
        return scores

    def _shown(self, layer: nn.Module, handler: Any) -> nn.Module | None:
        lines, axis = (self._lines or {}).get(layer), _AXES.get(handler)
        return None if lines is None or axis is None else stand_in(layer, axis, {"grad": lines})
