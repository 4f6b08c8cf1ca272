"""Gates on structures: a factor on what each sends through its output projection, and the factors' gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from gisp_kernels import gate_grads
from gisp_kernels.groups import Projection, StructureGroup
from gisp_kernels.record.gates import gate_projection


class Gates:
    """Multiplies what structures send through o_proj or down_proj, while active as a context manager.

    Args:
        groups: those gated; at least one.

    Attributes:
        values: float32 [structures], the factors, group after group; 1 = the model as it is.
        grad: float32 [structures], gradients of the factors, added over backward passes.
    """

    def __init__(self, groups: list[StructureGroup]) -> None:
        device = groups[0].projections[0].linear.weight.device
        self.spans: dict[str, slice] = {}
        self._outputs: dict[str, Projection] = {}
        start = 0
        for group in groups:
            self.spans[group.name] = slice(start, start + group.count)
            self._outputs[group.name] = gate_projection(group)
            start += group.count
        self.values = torch.ones(start, dtype=torch.float32, device=device)
        self.grad = torch.zeros(start, dtype=torch.float32, device=device)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Gates:
        # The gradient of a factor is taken beside autograd, which only has to pass through all gated layers.
        self._handles = [
            output.linear.register_forward_pre_hook(partial(self._gated, self.spans[name], output.block))
            for name, output in self._outputs.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _gated(self, span: slice, block: int, linear: nn.Linear, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        gated: torch.Tensor = _Gate.apply(args[0], self.values[span].requires_grad_(), self.grad[span], block)
        return (gated,)


class _Gate(torch.autograd.Function):
    """``x * gate``, a gate for ``block`` columns; the product is float32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, grad: torch.Tensor, block: int) -> torch.Tensor:
        ctx.save_for_backward(x, values)
        ctx.grad, ctx.block = grad, block
        return _scaled(x, values, block)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        x, values = ctx.saved_tensors
        (grad,) = grads
        # Of what the structure sends before its gate: a gate at zero has a gradient, too.
        ctx.grad += gate_grads(_sequences(x), _sequences(grad), block=ctx.block).sum(0)
        below = _scaled(grad, values, ctx.block) if ctx.needs_input_grad[0] else None
        return below, None, None, None


def _scaled(x: torch.Tensor, values: torch.Tensor, block: int) -> torch.Tensor:
    return (x.unflatten(-1, (-1, block)) * values[:, None]).flatten(-2).to(x.dtype)


def _sequences(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x[None]
