"""Gradients of attention's operands as those of what the projections gave: keys and values summed, rotation undone."""

from __future__ import annotations

import torch

from gisp_kernels import backend as backends


def unrotate_qkv(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor | None,
    kv_heads: int,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """The transpose of :func:`rotary` on queries and keys, and of :func:`expand_kv` on keys and values.

    Args:
        grads: of the queries, keys and values that attention read, [B, H, S, hd] each, hd even.
        cos, sin: [S, hd] in any float dtype.
        index: int64 [H], which key/value head each query head uses; ``None``: each has its own.
        kv_heads: number of key/value heads; one without query heads gets zeros.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        [B * S, (H + 2 * kv_heads) * hd] in their dtype: gradients of queries, keys and values side by side. Heads are
        summed in float32 in ascending order, and the sum is rounded before it is turned.

    Raises:
        ValueError: shapes that do not fit, or an odd hd.
    """
    query, key, value = grads
    if query.dim() != 4 or not query.shape == key.shape == value.shape:
        raise ValueError(f"grads [B, H, S, hd] do not fit: {query.shape}, {key.shape}, {value.shape}")
    batch, heads, length, size = query.shape
    if cos.shape != (length, size) or sin.shape != cos.shape or size % 2:
        raise ValueError(f"heads {tuple(query.shape)} of even size and tables [S, hd] do not fit: {cos.shape}")
    if kv_heads != heads if index is None else index.shape != (heads,):
        told = "every head has its own" if index is None else f"index is {tuple(index.shape)}"
        raise ValueError(f"{heads} heads on {kv_heads} key/value heads do not fit: {told}")
    out = query.new_empty(batch * length, (heads + 2 * kv_heads) * size)
    if backends.resolve(backend, query) == "triton":
        from gisp_kernels.triton.decoder import rotary as kernel

        kernel.unrotate(grads, cos, sin, index, kv_heads, out)
        return out
    shown = out.view(batch, length, -1, size)
    parts = [grad.transpose(1, 2) for grad in grads]
    if index is not None:
        parts[1:] = [_sum_heads(part, index, kv_heads) for part in parts[1:]]
    places = shown.split((heads, kv_heads, kv_heads), dim=2)
    for part, place in zip(parts[:2], places[:2], strict=True):
        place.copy_(_turned_back(part, cos[:, None], sin[:, None]))
    places[2].copy_(parts[2])
    return out


def _sum_heads(grad: torch.Tensor, index: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, S, H, hd] summed to [B, S, kv_heads, hd]."""
    total = grad.new_zeros((*grad.shape[:2], kv_heads, grad.shape[3]), dtype=torch.float32)
    for head in range(grad.shape[2]):
        total.index_add_(2, index[head : head + 1], grad[:, :, head : head + 1].float())
    return total.to(grad.dtype)


def _turned_back(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The transpose of the rotation, in float32."""
    value, half = grad.float(), grad.shape[-1] // 2
    turned = value * sin.float()
    return value * cos.float() + torch.cat((turned[..., half:], -turned[..., :half]), dim=-1)
