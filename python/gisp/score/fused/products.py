"""The matrix products of Linear layers in a pass without autograd.

Layers that read one input are one product to the caller: their outputs lie side by side, and so do the gradients of
these outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gisp_kernels.ops import float8

# Devices that work while the host launches, and elements that layers stacked there have at most.
_STACKING, _MOST_STACKED = ("cuda",), 2**24


def parameter(module: nn.Module, name: str) -> torch.Tensor:
    """A module's parameter of a name, ``None`` for one that it could have and has not.

    ``nn.Module`` looks elsewhere first, which takes as long as a launch where a pass asks a thousand times.
    """
    own: Any = module._parameters
    found: torch.Tensor = own[name] if name in own else getattr(module, name)
    return found


class Products:
    """Products in the weights' own dtype, under ``torch.no_grad``; a weight [O, I] may be a strided prefix of a larger
    one."""

    def stacked(self, linears: Sequence[nn.Linear]) -> torch.Tensor | None:
        """A copy of the weights of layers that read one input, [sum of O, I], where one product of it takes less time
        than one of each; else ``None``."""
        weights, widths = _weights(linears)
        return torch.cat(weights) if stacks(weights[0], sum(widths)) else None

    def forward(self, x: torch.Tensor, linears: Sequence[nn.Linear], stack: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ W.T + b`` of every layer, [T, I] to [T, sum of O].

        Args:
            stack: as :meth:`stacked` gave it.
        """
        if stack is not None:
            biases = [parameter(linear, "bias") for linear in linears]
            if biases[0] is None:
                return torch.mm(x, stack.t())
            return torch.addmm(torch.cat(biases), x, stack.t())
        if len(linears) == 1:
            return _linear(x, linears[0], parameter(linears[0], "weight"), None)
        weights, widths = _weights(linears)
        out = x.new_empty(x.shape[0], sum(widths))
        for linear, weight, part in zip(linears, weights, out.split_with_sizes(widths, 1), strict=True):
            _linear(x, linear, weight, part)
        return out

    def input_grad(
        self, grad: torch.Tensor, linears: Sequence[nn.Linear], stack: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum of ``grad @ W`` over the layers, [T, sum of O] to [T, I]; ``stack`` as in :meth:`forward`."""
        if stack is not None or len(linears) == 1:
            return torch.mm(grad, parameter(linears[0], "weight") if stack is None else stack)
        (first, *others), widths = _weights(linears)
        start, *parts = grad.split_with_sizes(widths, 1)
        total = torch.mm(start, first)
        for weight, part in zip(others, parts, strict=True):
            total.addmm_(part, weight)
        return total


class Float8Products(Products):
    """Products of 8-bit floats (see :mod:`gisp_kernels.ops.float8`), where extents are multiples of 16.

    Weights are rounded whenever they are used: kept, they would take half as much memory again. The gradient of a layer
    uses the scales of its last forward.
    """

    def __init__(self) -> None:
        self._scales: dict[tuple[nn.Linear, ...], torch.Tensor] = {}

    def stacked(self, linears: Sequence[nn.Linear]) -> torch.Tensor | None:
        """As :meth:`Products.stacked`."""
        return None if _fits(linears) else super().stacked(linears)

    def forward(self, x: torch.Tensor, linears: Sequence[nn.Linear], stack: torch.Tensor | None = None) -> torch.Tensor:
        """As :meth:`Products.forward`."""
        if not _fits(linears):
            return super().forward(x, linears, stack)
        _, widths = _weights(linears)
        stack = torch.empty(sum(widths), x.shape[1], dtype=float8.FLOAT8, device=x.device)
        scale = torch.empty(sum(widths), dtype=torch.float32, device=x.device)
        for linear, rows, own in zip(linears, stack.split(widths), scale.split(widths), strict=True):
            float8.quantize_rows(linear.weight.detach(), out=rows, scale=own)
        self._scales[tuple(linears)] = scale
        out = float8.scaled_product(*float8.quantize_rows(x), stack, scale, x.dtype)
        for linear, part in zip(linears, out.split(widths, dim=1), strict=True):
            if linear.bias is not None:
                part += linear.bias.detach()
        return out

    def input_grad(
        self, grad: torch.Tensor, linears: Sequence[nn.Linear], stack: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As :meth:`Products.input_grad`."""
        if not _fits(linears):
            return super().input_grad(grad, linears, stack)
        _, widths = _weights(linears)
        scale = self._scales[tuple(linears)]
        stack = torch.empty(linears[0].weight.shape[1], sum(widths), dtype=float8.FLOAT8, device=grad.device)
        for linear, columns, own in zip(linears, stack.split(widths, dim=1), scale.split(widths), strict=True):
            float8.quantize_transposed(linear.weight.detach(), own, out=columns)
        return float8.scaled_product(*float8.quantize_rows(grad, scale), stack, None, grad.dtype)


def stacks(weight: torch.Tensor, rows: int) -> bool:
    """Whether layers with a weight like this and so many rows together are stacked.

    Where layers are small, a product takes the host longer to launch than the GPU to make, and a copy of the weights
    takes the GPU a few microseconds. It depends on nothing but the weights, so that sums are the same in any batch.
    """
    return weight.device.type in _STACKING and rows * weight.shape[1] <= _MOST_STACKED


def _linear(x: torch.Tensor, linear: nn.Linear, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    turned, bias = weight.t(), parameter(linear, "bias")
    if bias is None:
        return torch.mm(x, turned) if out is None else torch.mm(x, turned, out=out)
    return torch.addmm(bias, x, turned) if out is None else torch.addmm(bias, x, turned, out=out)


def _weights(linears: Sequence[nn.Linear]) -> tuple[list[torch.Tensor], list[int]]:
    """The weights of layers and how many outputs each has."""
    weights = [parameter(linear, "weight") for linear in linears]
    return weights, [weight.shape[0] for weight in weights]


def _fits(linears: Sequence[nn.Linear]) -> bool:
    return all(float8.fits(*linear.weight.shape) for linear in linears)
