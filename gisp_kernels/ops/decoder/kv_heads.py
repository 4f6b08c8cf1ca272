"""Key/value heads spread over the query heads that use them."""

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

    Raises:
        ValueError: shapes that do not fit.
    """
    if kv.dim() != 3 or index.dim() != 1:
        raise ValueError(f"kv must be [T, KV, hd] and index [H], got {kv.shape}, {index.shape}")
    out = result("out", out, (kv.shape[0], index.shape[0], kv.shape[2]), kv)
    if backends.resolve(backend, kv) == "triton":
        from gisp_kernels.triton.decoder import kv_heads as kernel

        kernel.expand(kv, index, out)
        return out
    return out.copy_(kv.index_select(1, index))
