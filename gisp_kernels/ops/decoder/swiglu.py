"""``silu(gate) * up`` and its backward in place."""

from __future__ import annotations

import torch

from gisp_kernels import backend as backends
from gisp_kernels import checks
from gisp_kernels.checks import result
from gisp_kernels.ops.gate_grads import gate_grads


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """``silu(gate) * up``, [T, I] each; silu is rounded to dtype before the product, as modules do it.

    ``out`` takes the result and may be ``gate`` or ``up``.

    Raises:
        ValueError: operands of other shapes or dtypes.
    """
    _check(gate, up)
    out = result("out", out, gate.shape, gate)
    if backends.resolve(backend, gate) == "triton":
        from gisp_kernels.triton.decoder import swiglu as kernel

        kernel.forward(gate, up, out)
        return out
    return out.copy_(_forward(gate, up))


def swiglu_backward_(
    gate: torch.Tensor, up: torch.Tensor, grad_act: torch.Tensor, *, backend: str | None = None
) -> None:
    """Backward of :func:`swiglu`; every operand is overwritten.

    Args:
        gate: [T, I], becomes dL/d(gate).
        up: [T, I], becomes dL/d(up).
        grad_act: [T, I], dL/d(act), becomes the activation, bit for bit what :func:`swiglu` gave.

    Raises:
        ValueError: operands of other shapes or dtypes.
    """
    _check(gate, up)
    _check(gate, grad_act)
    if backends.resolve(backend, gate) == "triton":
        from gisp_kernels.triton.decoder import swiglu as kernel

        kernel.backward(gate, up, grad_act)
        return
    activation = _forward(gate, up)
    g, grad = gate.float(), grad_act.float()
    sigmoid = torch.sigmoid(g)
    grad_gate = grad * up.float() * sigmoid * (1 + g * (1 - sigmoid))
    up.copy_(grad * (g * sigmoid))
    gate.copy_(grad_gate)
    grad_act.copy_(activation)


def swiglu_backward_gates_(
    gate: torch.Tensor,
    up: torch.Tensor,
    grad_act: torch.Tensor,
    length: int,
    *,
    scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Backward of ``scale * swiglu(gate, up)`` by the same read as gradients of gates on its columns.

    Args:
        gate: [T, I], becomes dL/d(gate).
        up: [T, I], becomes dL/d(up).
        grad_act: [T, I], the gradient of the scaled activation; undefined afterwards.
        length: tokens of a sequence; divides T.
        scale: [I], same dtype; ``None`` for ones.
        out: float32 [T / length, I], any strides, overwritten; ``None`` for a new tensor.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        ``out``: ``sum swiglu(gate, up) * grad_act`` over the tokens of every sequence, as
        :func:`gisp_kernels.gate_grads` gives it.

    Raises:
        ValueError: operands of other shapes or dtypes, or a length that does not divide T.
    """
    _check(gate, up)
    _check(gate, grad_act)
    tokens, width = gate.shape
    if length < 1 or tokens % length:
        raise ValueError(f"length must divide the {tokens} tokens, got {length}")
    if out is None:
        out = torch.empty(tokens // length, width, dtype=torch.float32, device=gate.device)
    checks.check_same_shape("out", out, (tokens // length, width))
    if backends.resolve(backend, gate) == "triton":
        from gisp_kernels.triton.decoder import swiglu as kernel

        kernel.backward_gates(gate, up, grad_act, length, scale, out)
        return out
    by_sequence = (t.unflatten(0, (-1, length)) for t in (_forward(gate, up), grad_act))
    gate_grads(*by_sequence, out=out, backend="reference")
    swiglu_backward_(gate, up, grad_act if scale is None else grad_act.mul_(scale), backend="reference")
    return out


def _forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    g = gate.float()
    return (g * torch.sigmoid(g)).to(gate.dtype) * up


def _check(one: torch.Tensor, other: torch.Tensor) -> None:
    if one.dim() != 2 or one.shape != other.shape or one.dtype != other.dtype:
        raise ValueError(
            f"operands must be alike, [tokens, channels], got {one.dtype} {tuple(one.shape)} and "
            f"{other.dtype} {tuple(other.shape)}"
        )
