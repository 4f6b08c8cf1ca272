"""Hooks on a weight: its gradient is scored, and then accumulates as always or is put aside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from gisp_kernels.record.attach.copying import Uncopyable
from gisp_kernels.record.attach.parallel import refuse_data_parallel, whole


class Scored(Protocol):
    """What a watch needs of a tap."""

    name: str
    linear: Any

    @property
    def stored(self) -> torch.Tensor: ...

    def take_weight_grad(self, weight: torch.Tensor, grad: torch.Tensor) -> None: ...


class Watch(Uncopyable):
    """Gives a tap the gradient of its weight, once a backward pass: the sum over all uses of the weight.

    Args:
        keep_grad: leave the gradient to accumulate into ``.grad``; else ``.grad`` stays as it was.
        passing: called at every forward of the module that holds the weight.
    """

    def __init__(self, tap: Scored, *, keep_grad: bool, passing: Callable[[], None]) -> None:
        self._tap = tap
        self._keep_grad = keep_grad
        self._passing = passing
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._watched: list[torch.Tensor] = []
        self._kept_grad: list[torch.Tensor | None] = []

    def attach(self) -> None:
        """Set the hooks that the weight needs; a frozen one needs none."""
        weight = self._tap.stored
        if weight.requires_grad:
            self._watch(weight)
            self._handles.append(self._tap.linear.register_forward_pre_hook(_BeforeForward(self)))

    def detach(self) -> None:
        """Remove them; a ``.grad`` that an interrupted backward pass left aside comes back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._kept_grad:
            self._watched[0].grad = self._kept_grad.pop()
            self._kept_grad.clear()
        self._watched.clear()

    @property
    def copies(self) -> bool:
        """Whether a copy of the module works, unrecorded."""
        return self._keep_grad

    def before_forward(self) -> None:
        """Meet a forward of the module."""
        self._passing()
        if torch.is_grad_enabled():
            if not self._keep_grad:
                refuse_data_parallel(self._tap.name)
            # fully_shard lets the layer compute with another parameter than the one it shows outside.
            self._watch(self._tap.stored)

    def _watch(self, weight: torch.Tensor) -> None:
        if not (weight.requires_grad and weight.is_leaf) or any(weight is known for known in self._watched):
            return
        self._watched.append(weight)
        self._handles.append(weight.register_hook(partial(self._take, weight)))
        if not self._keep_grad:
            self._handles.append(weight.register_post_accumulate_grad_hook(self._restore))

    def _take(self, weight: torch.Tensor, grad: torch.Tensor) -> None:
        self._tap.take_weight_grad(whole(weight), whole(grad))
        if not self._keep_grad:
            self._kept_grad.append(weight.grad)
            weight.grad = None

    def _restore(self, weight: torch.Tensor) -> None:
        weight.grad = self._kept_grad.pop()


class _BeforeForward(Uncopyable):
    """Hook of the module."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        # Compiled code computes with the parameter the module shows, which is hooked already.
        if not torch.compiler.is_compiling():
            self._watch.before_forward()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        if not self._watch.copies:
            self._refuse()
        return _nothing


def _nothing(module: nn.Module, inputs: Any) -> None:
    """What the hook is in a copy of the module."""
