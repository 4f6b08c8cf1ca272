"""Hooks on a weight: its gradient is scored, and then accumulates as always or is put aside.

A frozen weight requires a gradient while it is recorded. Layers that are recorded in their forward go without, so that
none is formed unless other code uses the weight: attention that hands it to a function, a view, an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from gisp_kernels.record.attach.copying import Uncopyable
from gisp_kernels.record.attach.parallel import is_sharded, refuse_data_parallel, whole
from gisp_kernels.record.attach.transforms import refuse_transforms


class Scored(Protocol):
    """What a watch needs of a tap."""

    name: str
    linear: Any

    @property
    def stored(self) -> torch.Tensor: ...

    def check_own(self) -> None: ...

    def take_weight_grad(self, weight: torch.Tensor, grad: torch.Tensor) -> None: ...


# By id, the ``.grad`` that weights had before a backward pass. Modules that share a weight share its entry.
_aside: dict[int, torch.Tensor | None] = {}


class Watch(Uncopyable):
    """Gives a tap the gradient of its weight, once a backward pass: the sum over all uses of the weight.

    Args:
        keep_grad: leave the gradient to accumulate into ``.grad``; else ``.grad`` stays as it was.
        frozen: the weight requires no gradient outside the recorder, and keeps its ``.grad``.
        in_forward: the module's forward is recorded by itself.
        passing: called at every forward of the module that holds the weight.
    """

    def __init__(
        self, tap: Scored, *, keep_grad: bool, frozen: bool, in_forward: bool, passing: Callable[[], None]
    ) -> None:
        self._tap = tap
        self._keep_grad = keep_grad and not frozen
        self._frozen = frozen
        self._in_forward = in_forward
        self._passing = passing
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._watched: list[torch.Tensor] = []
        self.sharded = False

    def attach(self) -> None:
        """Set the hooks that the weight needs."""
        module, weight = self._tap.linear, self._tap.stored
        self.sharded = is_sharded(weight)
        if self._frozen:
            if not can_require_grad(module, weight):
                return
            weight.requires_grad_(True)
        self._watch(weight)
        if not (self._frozen and self._in_forward):
            self._handles.append(module.register_forward_pre_hook(_BeforeForward(self)))
        if self.sharded and "forward" not in module.__dict__:
            module.forward = Renewed(module.forward)

    def detach(self) -> None:
        """Remove them; a ``.grad`` that an interrupted backward pass left aside comes back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if isinstance(self._tap.linear.__dict__.get("forward"), Renewed):
            del self._tap.linear.forward
        for weight in self._watched:
            _restore(weight)
            if self._frozen:
                weight.requires_grad_(False)
        self._watched.clear()

    @property
    def copies(self) -> bool:
        """Whether a copy of the module works, unrecorded."""
        return self._keep_grad

    def before_forward(self) -> None:
        """Meet a forward of the module."""
        self._passing()
        self._tap.check_own()
        if torch.is_grad_enabled():
            if not (self._keep_grad or self._frozen):
                refuse_data_parallel(self._tap.name)
            # fully_shard lets the layer compute with another parameter than the one it shows outside.
            self._watch(self._tap.stored)

    def _watch(self, weight: torch.Tensor) -> None:
        if not (weight.requires_grad and weight.is_leaf) or any(weight is known for known in self._watched):
            return
        self._watched.append(weight)
        self._handles.append(weight.register_hook(partial(self._take, weight)))
        if not self._keep_grad:
            self._handles.append(weight.register_post_accumulate_grad_hook(_restore))

    def _take(self, weight: torch.Tensor, grad: torch.Tensor | None) -> None:
        if grad is None:
            return  # an autograd function of other code that forms none
        refuse_transforms(self._tap.name, grad)
        self._tap.take_weight_grad(whole(weight), whole(grad))
        if not self._keep_grad:
            _aside.setdefault(id(weight), weight.grad)
            weight.grad = None
            # torch.autograd.grad accumulates nothing.
            torch.autograd.Variable._execution_engine.queue_callback(partial(_restore, weight))


def _restore(weight: torch.Tensor) -> None:
    if id(weight) in _aside:
        weight.grad = _aside.pop(id(weight))


def can_require_grad(module: nn.Module, weight: torch.Tensor) -> bool:
    """Whether a weight of a module is a parameter that can require a gradient."""
    held = any(weight is parameter for parameter in module._parameters.values())
    return held and not weight.is_inference() and not is_sharded(weight)


class _BeforeForward(Uncopyable):
    """Hook of the module."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._outside = torch.compiler.disable(watch.before_forward)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._watch.before_forward()
        elif self._watch.sharded:
            self._outside()
        # Else compiled code computes with the parameter the module shows, which is hooked already.

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        if not self._watch.copies:
            self._refuse()
        return _nothing


class Renewed(Uncopyable):
    """The forward of a module as an object of its own: code compiled before looks at that, not at new hooks."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def _nothing(module: nn.Module, inputs: Any) -> None:
    """What the hook is in a copy of the module."""
