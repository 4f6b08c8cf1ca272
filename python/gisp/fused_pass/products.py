"""The matrix products of a Linear layer in a pass without autograd, in the weights' own dtype."""

from __future__ import annotations

import torch
from torch import nn


class Products:
    """Products of activations [T, features] with the weight of a Linear [O, I], which may be a strided prefix."""

    def forward(self, x: torch.Tensor, linear: nn.Linear, out: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ W.T + b``, [T, O]."""
        weight = linear.weight.detach().t()
        if linear.bias is None:
            return torch.mm(x, weight) if out is None else torch.mm(x, weight, out=out)
        bias = linear.bias.detach()
        return torch.addmm(bias, x, weight) if out is None else torch.addmm(bias, x, weight, out=out)

    def input_grad(self, grad: torch.Tensor, linear: nn.Linear, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """``grad @ W``, [T, I], or that added to ``add_to`` in place."""
        weight = linear.weight.detach()
        return torch.mm(grad, weight) if add_to is None else add_to.addmm_(grad, weight)
