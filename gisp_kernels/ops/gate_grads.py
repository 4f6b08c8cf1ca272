"""Gradients of gates on structures, a sequence at a time, and the change of the loss they predict.

A gate multiplies what a structure sends through its output projection: the columns of o_proj or down_proj that read it.
At 1 the model is as it is, at 0 the structure is gone. With ``X`` the projection's input and ``dX`` the gradient of the
loss with respect to it, the gate's gradient is ``sum X * dX`` over tokens and the structure's columns: tensors every
backward pass makes anyway, so no weight gradient is formed.

Closing the gate changes the loss by ``-g + h / 2`` to second order (LeCun et al., Optimal Brain Damage, 1990), ``g``
being the gradient and ``h`` the curvature. For the curvature stand squared gradients of sequences, scaled to what those
of tokens would add up to (after Kwon et al., arXiv 2204.09656, who square a whole sample's and use no ``g``).
That is the empirical Fisher information where gradients of a sequence's tokens are uncorrelated and vanish on average,
and more where they agree, as they do once a model is pruned.
"""

from __future__ import annotations

import torch

from gisp_kernels import backend as backends
from gisp_kernels import checks

# So many elements are squared at a time, which bounds the float64 copies.
_CHUNK_ELEMENTS = 2**22


def gate_grads(
    input: torch.Tensor,
    grad_input: torch.Tensor,
    *,
    block: int = 1,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``sum input * grad_input`` over the tokens of every sequence and the columns of every structure.

    Args:
        input: [B, S, I], what an output projection reads; float32, bfloat16 or float16, any strides.
        grad_input: [B, S, I], gradient of the loss with respect to it; its dtype may differ.
        block: consecutive columns of a structure; must divide I.
        out: float32 [B, I / block], any strides, overwritten; ``None`` for a new tensor.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        float32 [B, I / block]: ``out`` if given. Products and sums are float32, in a fixed order.

    Raises:
        TypeError: unsupported dtype.
        ValueError: shapes, device or block that do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    for name, tensor in (("input", input), ("grad_input", grad_input)):
        checks.check_float(name, tensor)
    if input.dim() != 3:
        raise ValueError(f"input must have 3 dimensions (sequences, tokens, columns), got {tuple(input.shape)}")
    checks.check_same_shape("grad_input", grad_input, input.shape)
    checks.check_same_device(input=input, grad_input=grad_input)
    checks.check_block(block)
    if input.shape[2] % block:
        raise ValueError(f"block must divide the {input.shape[2]} columns of the input, got {block}")
    shape = (input.shape[0], input.shape[2] // block)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=input.device)
    elif out.dtype != torch.float32 or out.requires_grad:
        raise TypeError(f"out must be float32 without gradient, got {out.dtype}")
    checks.check_same_shape("out", out, shape)
    checks.check_same_device(out=out, input=input)
    write_gate_grads(out, input.detach(), grad_input.detach(), block, backend)
    return out


def write_gate_grads(
    out: torch.Tensor, input: torch.Tensor, grad_input: torch.Tensor, block: int, backend: str | None = None
) -> None:
    """:func:`gate_grads` of checked arguments without gradients: a pass makes them itself, two for every layer."""
    if backends.resolve(backend, input) == "triton":
        from gisp_kernels.triton import gate_grads as kernel

        kernel.launch(out, input, grad_input, block)
    else:
        columns = (input.float() * grad_input.float()).sum(1)
        out.copy_(columns.view(*out.shape, block).sum(2))


def predicted_loss_change(grads: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """Change of the loss to second order when a structure goes, ``-sum_b g_b + sum_b c_b g_b^2 / 2``; of either sign.

    Returns:
        float32 [structures], summed in float64; arguments as in :func:`gate_sums`.
    """
    return loss_change(gate_sums(grads, curvature))


def loss_change(sums: torch.Tensor, first_order: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The predicted change from sums over sequences, float32 [structures].

    Args:
        sums: float64 [3, structures] of :func:`gate_sums`, added over any number of batches.
        first_order: weight of the first-order term, one for all or [structures].

    Raises:
        ValueError: ``sums`` has another shape.
    """
    if sums.dim() != 2 or len(sums) != 3:
        raise ValueError(f"sums must have shape [3, structures], got {tuple(sums.shape)}")
    return (sums[1] / 2 - first_order * sums[0]).float()


def gate_sums(grads: torch.Tensor, curvature: torch.Tensor, samples: torch.Tensor | None = None) -> torch.Tensor:
    """Sums over sequences that add up over batches: ``sum g_b``, ``sum c_b g_b^2`` and ``sum g_b^2``.

    For a loss that is a weighted sum over sequences of the mean NLL of ``n_b`` scored tokens, with weights ``w_b``,
    ``c_b = n_b / |w_b|``; for the mean over all scored tokens of a batch that is their number. A sequence of negative
    weight counts as curvature too, which is not that of its part of the loss.

    Args:
        grads: float32 [B, structures], :func:`gate_grads` of every sequence's part of the loss.
        curvature: [B], the factors ``c_b``; with ``samples`` [N], those of the samples.
        samples: int64 [B] in [0, N), the sample of every sequence, for sequences that are not independent (answers of
            one question): gradients of one sample are added before they are squared, in a fixed order. The range is
            checked on the CPU alone; elsewhere sequences outside of it are left out.

    Returns:
        float64 [3, structures].

    Raises:
        TypeError: ``grads`` are not floating point, ``samples`` no integers.
        ValueError: shapes or devices that do not fit, or samples out of range.
    """
    checks.check_matrix("grads", grads)
    checks.check_tensor("curvature", curvature)
    checks.check_same_device(grads=grads, curvature=curvature)
    members = None if samples is None else _members(samples, len(curvature), grads)
    if members is None:
        checks.check_same_shape("curvature", curvature, grads.shape[:1])
    sums = torch.empty(3, grads.shape[1], dtype=torch.float64, device=grads.device)
    factors = curvature.double()[:, None]
    columns = max(1, _CHUNK_ELEMENTS // max(1, grads.shape[0]))
    for start in range(0, grads.shape[1], columns):
        chunk = slice(start, start + columns)
        # Squares of small gradients would leave the range of float32.
        wide = grads[:, chunk].double()
        if members is not None:
            wide = members @ wide
        torch.sum(wide, 0, out=sums[0, chunk])
        squares = wide.square_()
        torch.sum(squares, 0, out=sums[2, chunk])
        torch.sum(squares.mul_(factors), 0, out=sums[1, chunk])
    return sums


def _members(samples: torch.Tensor, count: int, grads: torch.Tensor) -> torch.Tensor:
    """Which sequences each of ``count`` samples has, float64 [count, B] of 0 and 1."""
    checks.check_tensor("samples", samples)
    if samples.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"samples must be integers, got {samples.dtype}")
    checks.check_same_shape("samples", samples, grads.shape[:1])
    # On a GPU the check would have to wait for the values.
    if samples.is_cpu and samples.numel() and not 0 <= int(samples.min()) <= int(samples.max()) < count:
        raise ValueError(f"samples must be from 0 to {count - 1}, as many as there are factors")
    numbers = torch.arange(count, device=grads.device)
    return (numbers[:, None] == samples.to(grads.device)).double()
