"""Plain torch versions of the importance ops: their specification, their fallback and the oracle of the tests."""

from __future__ import annotations

import torch

from gisp_kernels.alignment import pad_tokens


def abs_weighted_reduce_(out: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, axis: str, block: int) -> None:
    """Add ``sum |weight * grad|`` of every structure to ``out``; product and sum in float32.

    Args:
        out: float32 [count].
        weight: [O, I], any floating dtype.
        grad: [O, I], any floating dtype.
        axis: ``"row"`` for structures of ``block`` rows, ``"column"`` for columns.
        block: rows or columns per structure.
    """
    product = (weight.detach().float() * grad.detach().float()).abs_()
    lines = product.sum(dim=1 if axis == "row" else 0)
    out.add_(lines.view(out.shape[0], block).sum(dim=1))


def weight_grad(grad_output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """Weight gradient of a Linear, ``grad_output.T @ input``, [O, I], rounded to their dtype.

    Args:
        grad_output: [T, O].
        input: [T, I], same dtype.
    """
    left, right = grad_output.detach(), input.detach()
    if left.is_cuda:
        left, right = pad_tokens(left, right)
    return torch.mm(left.t(), right)[: grad_output.shape[1], : input.shape[1]]


def wgrad_importance_(
    out: torch.Tensor,
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    axis: str,
    block: int,
) -> None:
    """Add ``sum |weight * G|`` of every structure to ``out``, with ``G = grad_output.T @ input`` in their dtype."""
    abs_weighted_reduce_(out, weight, weight_grad(grad_output, input), axis, block)


def gate_grads_(out: torch.Tensor, input: torch.Tensor, grad_input: torch.Tensor, block: int) -> None:
    """Write ``sum input * grad_input`` over tokens and ``block`` columns to ``out``; product and sum in float32.

    Args:
        out: float32 [B, I / block].
        input, grad_input: [B, S, I], any floating dtype.
    """
    columns = (input.detach().float() * grad_input.detach().float()).sum(1)
    out.copy_(columns.view(*out.shape, block).sum(2))
