"""Key/value heads spread over the query heads that use them, and the sum that is its transpose."""

from __future__ import annotations

import torch

from gisp_kernels import backend as backends
from gisp_kernels.checks import result


def expand_kv(
    kv: torch.Tensor, index: torch.Tensor, *, out: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """``kv[:, index]``.

    Args:
        kv: [T, KV, hd].
        index: int64 [H], values below KV.
        out: [T, H, hd] for the result; shares no memory with ``kv``.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        [T, H, hd].
    """
    if kv.dim() != 3 or index.dim() != 1:
        raise ValueError(f"kv must be [T, KV, hd] and index [H], got {kv.shape}, {index.shape}")
    out = result("out", out, (kv.shape[0], index.shape[0], kv.shape[2]), kv)
    if backends.resolve(backend, kv) == "triton":
        from gisp_kernels.triton import kv_heads as kernel

        kernel.expand(kv, index, out)
        return out
    return out.copy_(kv.index_select(1, index))


def sum_kv(
    grad: torch.Tensor,
    index: torch.Tensor,
    kv_heads: int,
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum over the query heads of each key/value head: the transpose of :func:`expand_kv`.

    Args:
        grad: [T, H, hd].
        index: int64 [H], which key/value head each query head uses.
        kv_heads: number of key/value heads; one without query heads gets zeros.
        out: [T, kv_heads, hd] for the result; shares no memory with ``grad``.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        [T, kv_heads, hd] in the dtype of ``grad``, summed in float32 by ascending query head.
    """
    if grad.dim() != 3 or index.shape != grad.shape[1:2]:
        raise ValueError(f"grad [T, H, hd] and index [H] do not fit: {grad.shape}, {index.shape}")
    out = result("out", out, (grad.shape[0], kv_heads, grad.shape[2]), grad)
    if backends.resolve(backend, grad) == "triton":
        from gisp_kernels.triton import kv_heads as kernel

        kernel.sum_heads(grad, index, out)
        return out
    total = torch.zeros(grad.shape[0], kv_heads, grad.shape[2], dtype=torch.float32, device=grad.device)
    for head in range(grad.shape[1]):
        total.index_add_(1, index[head : head + 1], grad[:, head : head + 1].float())
    return out.copy_(total)
