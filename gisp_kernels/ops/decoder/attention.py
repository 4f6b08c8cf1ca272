"""Causal attention, forward and then backward, without a graph where torch runs its flash attention.

The kernels are torch's own. Recording and running a graph of one node costs the host as much as ten launches, a third
of that for the thread that runs it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Head sizes whose backward pass flash attention has on every GPU that runs it; others are padded or refused.
_LARGEST, _MULTIPLE = 192, 8


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Gradients]]:
    """``scaled_dot_product_attention`` with a causal mask, and its backward pass.

    Args:
        query, key, value: [B, H, S, hd], in any strides with contiguous heads.
        scale: what products of queries and keys are multiplied with before the softmax.

    Returns:
        The output, [B, H, S, hd], and what turns dL/d(output) into dL/d(query), dL/d(key) and dL/d(value). Both have
        the bits that torch's function has with autograd.
    """
    if _runs_flash(query, key, value, scale):
        by_flash = _on_cpu if query.device.type == "cpu" else _on_gpu
        return by_flash(query.detach(), key.detach(), value.detach(), scale)
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        output = functional.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=True, scale=scale)

    def backward(grad: torch.Tensor) -> Gradients:
        of_query, of_key, of_value = torch.autograd.grad(output, leaves, grad)
        return of_query, of_key, of_value

    return output.detach(), backward


def _runs_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> bool:
    """Whether torch's function would run flash attention on these operands."""
    size = query.shape[-1]
    if query.device.type not in ("cpu", "cuda") or size % _MULTIPLE or size > _LARGEST:
        return False
    chosen = torch._fused_sdp_choice(query, key, value, None, 0.0, True, scale=scale)
    return chosen == SDPBackend.FLASH_ATTENTION.value


def _on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Gradients]]:
    # torch.ops takes the host twice as long, and has the backward pass alone.
    output, log_sum, starts_q, starts_k, longest_q, longest_k, seed, offset, _ = (
        torch._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)
    )

    def backward(grad: torch.Tensor) -> Gradients:
        run = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
        lengths = starts_q, starts_k, longest_q, longest_k
        found: Gradients = run(grad, query, key, value, output, log_sum, *lengths, 0.0, True, seed, offset, scale=scale)
        return found

    return output, backward


def _on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Gradients]]:
    output, log_sum = torch._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)

    def backward(grad: torch.Tensor) -> Gradients:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        found: Gradients = run(grad, query, key, value, output, log_sum, 0.0, True, scale=scale)
        return found

    return output, backward
