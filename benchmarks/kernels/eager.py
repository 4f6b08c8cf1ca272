"""Elementwise parts of a decoder layer as plain PyTorch writes them: baselines, compiled too, and in float64 the truth.

Rounding follows transformers' Llama modules.
"""

from __future__ import annotations

import torch
from torch.nn import functional

Tensors = tuple[torch.Tensor, ...]


def working(tensor: torch.Tensor) -> torch.Tensor:
    """The precision modules compute in: float32, or float64 for float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def add_rms_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> Tensors:
    """``x + delta`` and its RMS norm."""
    total = x + delta
    value = working(total)
    unit = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * unit.to(x.dtype)


def rms_norm_backward(
    grad: torch.Tensor, normed_grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor
) -> Tensors:
    """``grad`` plus the gradient of the norm's input; ``rstd`` [T]."""
    inverse = rstd[:, None]
    unit = working(x) * inverse
    weighted = working(normed_grad) * working(weight)
    input_grad = inverse * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    return (grad + input_grad.to(grad.dtype),)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
    """Rotated heads; x [T, H, hd], tables [T, hd]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos[:, None] + turned * sin[:, None],)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> Tensors:
    """``silu(gate) * up``."""
    return (functional.silu(gate) * up,)


def swiglu_backward(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> Tensors:
    """Gradients of gate and up, and the activation."""
    value, incoming = working(gate), working(grad)
    sigmoid = torch.sigmoid(value)
    grad_gate = incoming * working(up) * sigmoid * (1 + value * (1 - sigmoid))
    grad_up = incoming * (value * sigmoid)
    return grad_gate.to(gate.dtype), grad_up.to(gate.dtype), functional.silu(gate) * up


def swiglu_backward_gates(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, length: int) -> Tensors:
    """Gradients of gate and up, and of gates on the columns of every sequence."""
    *grads, act = swiglu_backward(gate, up, grad)
    return *grads, (working(act) * working(grad)).unflatten(0, (-1, length)).sum(1)


def token_nll_grad(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> Tensors:
    """Gradient of the weighted NLL with respect to the logits, and the NLL of every token."""
    value = working(logits)
    log_probability = torch.log_softmax(value, dim=-1)
    nll = -log_probability.gather(1, targets[:, None])[:, 0]
    gradient = log_probability.exp()
    gradient = gradient.scatter_add(1, targets[:, None], torch.full_like(gradient[:, :1], -1))
    return (gradient * weights[:, None].to(value.dtype)).to(logits.dtype), nll
