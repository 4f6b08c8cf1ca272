"""RMS norm with the residual addition before it, and its backward into the residual gradient.

Follows transformers' ``LlamaRMSNorm``: the inverse RMS is float32, the scaled input is rounded to the tensor's dtype
and then multiplied with the weight.
"""

from __future__ import annotations

import torch

from gisp_kernels import backend as backends
from gisp_kernels.checks import result


def add_rms_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    total: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of ``x + delta``.

    Args:
        x: [T, D].
        delta: [T, D] or ``None`` for zero.
        weight: [D], same dtype as ``x``.
        eps: added to the mean square.
        total: where ``x + delta`` goes, may be ``x`` or ``delta`` itself; unused without ``delta``.
        out: where the norm goes; shares no memory with the sum.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        ``x + delta`` rounded to dtype (``x`` itself without ``delta``), its norm [T, D], and the inverse RMS,
        float32 [T].

    Raises:
        ValueError: operands of other shapes or dtypes.
    """
    _check(x, weight, delta)
    summed = x if delta is None else result("total", total, x.shape, x)
    out = result("out", out, x.shape, x)
    if backends.resolve(backend, x) == "triton":
        from gisp_kernels.triton.decoder import rms_norm as kernel

        return summed, out, kernel.add_norm(x, delta, weight, eps, summed, out)
    if delta is not None:
        summed.copy_(x + delta)
    rstd = torch.rsqrt(summed.float().pow(2).mean(1) + eps)
    return summed, _apply(summed, rstd, weight, out), rstd


def rms_norm_apply(
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The norm of ``x`` [T, D] from its saved inverse RMS (float32 [T]): the bits :func:`add_rms_norm` gave.

    ``out`` takes the result and may be ``x``.

    Raises:
        ValueError: operands of other shapes or dtypes.
    """
    _check(x, weight)
    _check_rstd(rstd, x)
    out = result("out", out, x.shape, x)
    if backends.resolve(backend, x) == "triton":
        from gisp_kernels.triton.decoder import rms_norm as kernel

        kernel.apply_norm(x, rstd, weight, out)
        return out
    return _apply(x, rstd, weight, out)


def rms_norm_backward_(
    grad: torch.Tensor | None,
    normed_grad: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Gradient of the norm's input, added to ``grad`` in place.

    Args:
        grad: [T, D] to add to; ``None``: the result takes the place of ``normed_grad``.
        normed_grad: [T, D], dL/d(norm).
        x, rstd, weight: input [T, D], inverse RMS float32 [T] and weight [D] of the forward.

    Returns:
        ``grad``, or ``normed_grad`` overwritten. The sum is float32 and rounded once.

    Raises:
        ValueError: operands of other shapes or dtypes.
    """
    _check(x, weight, normed_grad, grad)
    _check_rstd(rstd, x)
    if backends.resolve(backend, x) == "triton":
        from gisp_kernels.triton.decoder import rms_norm as kernel

        return kernel.backward(grad, normed_grad, x, rstd, weight)
    inverse = rstd[:, None]
    unit = x.float() * inverse
    weighted = normed_grad.float() * weight.float()
    input_grad = inverse * (weighted - unit * (weighted * unit).mean(1, keepdim=True))
    return normed_grad.copy_(input_grad) if grad is None else grad.copy_(grad.float() + input_grad)


def _apply(x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(weight * (x.float() * rstd[:, None]).to(x.dtype))


def _check(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> None:
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"x must be [tokens, features] and weight [features], got {x.shape} and {weight.shape}")
    for other in others:
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
            raise ValueError(f"all operands must be {x.dtype} {tuple(x.shape)}, got {other.dtype} {tuple(other.shape)}")


def _check_rstd(rstd: torch.Tensor, x: torch.Tensor) -> None:
    if rstd.shape != x.shape[:1] or rstd.dtype != torch.float32:
        raise ValueError(f"rstd must be torch.float32 {tuple(x.shape[:1])}, got {rstd.dtype} {tuple(rstd.shape)}")
