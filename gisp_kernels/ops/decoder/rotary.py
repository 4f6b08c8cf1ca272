"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch

from gisp_kernels import backend as backends
from gisp_kernels.checks import result


def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``x * cos + rotate_half(x) * sin`` as in transformers' ``apply_rotary_pos_emb``.

    Args:
        x: [T, H, hd], hd even; token ``t`` is at position ``t % S``.
        cos, sin: [S, hd] in any float dtype; S divides T.
        out: [T, H, hd] for the result, may be ``x``.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        [T, H, hd] in the dtype of ``x``, rounded once.

    Raises:
        ValueError: shapes that do not fit, or an odd hd.
    """
    if (
        x.dim() != 3
        or cos.shape != sin.shape
        or cos.shape[1:] != x.shape[2:]
        or cos.shape[0] == 0
        or x.shape[0] % cos.shape[0]
    ):
        raise ValueError(f"x [T, H, hd] and tables [S, hd] do not fit: {x.shape}, {cos.shape}, {sin.shape}")
    if x.shape[2] % 2:
        raise ValueError(f"the head size of x must be even, got {x.shape[2]}")
    out = result("out", out, x.shape, x)
    if backends.resolve(backend, x) == "triton":
        from gisp_kernels.triton.decoder import rotary as kernel

        kernel.launch(x, cos, sin, out)
        return out
    repeats = x.shape[0] // cos.shape[0]
    c, s = (table.float().repeat(repeats, 1)[:, None] for table in (cos, sin))
    value, half = x.float(), x.shape[2] // 2
    turned = torch.cat((-value[..., half:], value[..., :half]), dim=-1) * s
    return out.copy_(value * c + turned)
