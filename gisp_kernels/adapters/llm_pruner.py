"""Taylor importance for LLM-Pruner (https://github.com/horseee/LLM-Pruner), without weight gradients.

::

    importance = TaylorImportance(model, taylor="param_second")
    pruner = tp.pruner.MetaPruner(model, prompts, importance=importance, ...)
    with importance.record_examples():
        for example in examples:
            model(example, labels=example).loss.backward()
    pruner.step()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import LLMPruner.torch_pruning as tp
import torch
from LLMPruner.pruner import hf_llama_pruner as peer
from torch import nn

from gisp_kernels.adapters.stand_in import Lines, linears_of, lines_of, stand_in, with_stand_ins
from gisp_kernels.groups import Axis
from gisp_kernels.record.importance import record_lines

__all__ = ["TaylorImportance"]

_AXES = dict.fromkeys((tp.prune_linear_out_channels, peer.hf_linear_pruner.prune_out_channels), "row")
_AXES |= dict.fromkeys((tp.prune_linear_in_channels, peer.hf_linear_pruner.prune_in_channels), "column")
_NEEDS = {"param_second": ("acc_grad",), "param_mix": ("grad", "acc_grad")}
_CONTEXTS = {"grad": "record()", "acc_grad": "record_examples()"}


class TaylorImportance(peer.TaylorImportance):
    """Scores Linear layers by what was recorded, everything else as LLM-Pruner does.

    ``vectorize`` and ``param_first`` need :meth:`record`, ``param_second`` needs :meth:`record_examples`, and
    ``param_mix`` both: it mixes element by element, from ``.grad`` and a float32 matrix for each weight.

    Args:
        model: what will be pruned.
        taylor: as ``--taylor`` of LLM-Pruner.
        options: further ones of its ``TaylorImportance``.
    """

    def __init__(self, model: nn.Module, *, taylor: str = "param_first", **options: Any) -> None:
        super().__init__(taylor=taylor, **options)
        self._model = model
        self._needed = _NEEDS.get(taylor, ("grad",))
        self._lines: dict[str, dict[nn.Module, Lines]] = {}

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record the backward passes whose gradients are summed."""
        linears = linears_of(self._model)
        if self.taylor == "param_mix":
            yield
            self._lines["grad"] = {m: Lines.of_gradient(m.weight) for m in linears.values()}
            return
        with record_lines(linears, mode="signed" if self.taylor == "vectorize" else "exact") as recorder:
            yield
        self._lines["grad"] = lines_of(recorder, linears, "row", "column")

    @contextlib.contextmanager
    def record_examples(self) -> Iterator[None]:
        """Record one backward pass for every example; their gradients are squared and averaged, and not kept."""
        linears = linears_of(self._model)
        scored = {id(layer.weight) for layer in linears.values()}
        others = [p for p in self._model.parameters() if id(p) not in scored and p.requires_grad]
        axes: tuple[Axis, ...] = ("element",) if self.taylor == "param_mix" else ("row", "column")
        with contextlib.ExitStack() as stack:
            for parameter in others:
                parameter.grad, parameter.acc_grad = None, torch.zeros_like(parameter)  # type: ignore[attr-defined]
                stack.callback(parameter.register_post_accumulate_grad_hook(_add_square).remove)
            recorder = stack.enter_context(record_lines(linears, axes, power=2))
            yield
        found, passes = lines_of(recorder, linears, *axes), recorder.backward_calls
        self._lines["acc_grad"] = {layer: lines.divided(passes) for layer, lines in found.items()}
        for parameter in others:
            # The peer multiplies with the gradient before it does without.
            parameter.grad, parameter.acc_grad = torch.zeros_like(parameter), parameter.acc_grad / passes  # type: ignore[attr-defined]

    def __call__(self, group: Any, ch_groups: int = 1, consecutive_groups: int = 1) -> torch.Tensor | None:
        """Scores of a group's channels, as of LLM-Pruner's own importance.

        Raises:
            RuntimeError: what the scores need was not recorded, or a layer changed its shape since then.
        """
        missing = [_CONTEXTS[name] for name in self._needed if name not in self._lines]
        if missing:
            raise RuntimeError(f"{self.taylor!r} needs backward passes inside {' and '.join(missing)} first")
        shown = with_stand_ins(group, self._shown)
        scores: torch.Tensor | None = super().__call__(shown, ch_groups, consecutive_groups)
        return scores

    def _shown(self, layer: nn.Module, handler: Any) -> nn.Module | None:
        axis = _AXES.get(handler)
        lines = {name: self._lines[name][layer] for name in self._needed if layer in self._lines[name]}
        # The peer reads a gradient in every case; where there is none it does not count.
        return stand_in(layer, axis, {"grad": lines[self._needed[0]], **lines}) if axis and lines else None


def _add_square(parameter: Any) -> None:
    parameter.acc_grad += parameter.grad.square()
    parameter.grad = None
