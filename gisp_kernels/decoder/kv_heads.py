"""Key/value heads spread over the query heads that use them, and the sum that is its transpose."""

from __future__ import annotations

import torch

from gisp_kernels import backend as backends

SUPPORTED = ("triton",)


def expand_kv(kv: torch.Tensor, index: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """``kv[:, index]``, contiguous.

    Args:
        kv: [T, KV, hd], last dimension contiguous.
        index: int64 [H], values below KV.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        [T, H, hd].
    """
    if kv.dim() != 3 or index.dim() != 1:
        raise ValueError(f"kv must be [T, KV, hd] and index [H], got {kv.shape}, {index.shape}")
    if backends.resolve(backend, kv, SUPPORTED) == "triton":
        from gisp_kernels.triton_kernels import kv_heads as kernel

        return kernel.expand(kv, index)
    return kv.index_select(1, index)


def sum_kv(grad: torch.Tensor, index: torch.Tensor, kv_heads: int, *, backend: str | None = None) -> torch.Tensor:
    """Sum over the query heads of each key/value head: the transpose of :func:`expand_kv`.

    Args:
        grad: [T, H, hd], last dimension contiguous.
        index: int64 [H], which key/value head each query head uses.
        kv_heads: number of key/value heads; one without query heads gets zeros.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        [T, kv_heads, hd] in the dtype of ``grad``, summed in float32 by ascending query head.
    """
    if grad.dim() != 3 or index.shape != grad.shape[1:2]:
        raise ValueError(f"grad [T, H, hd] and index [H] do not fit: {grad.shape}, {index.shape}")
    if backends.resolve(backend, grad, SUPPORTED) == "triton":
        from gisp_kernels.triton_kernels import kv_heads as kernel

        return kernel.sum_heads(grad, index, kv_heads)
    total = torch.zeros(grad.shape[0], kv_heads, grad.shape[2], dtype=torch.float32, device=grad.device)
    for head in range(grad.shape[1]):
        total.index_add_(1, index[head : head + 1], grad[:, head : head + 1].float())
    return total.to(grad.dtype)
