"""First-order importance of structures: sums of ``|W * dL/dW|`` over blocks of rows or columns of a weight.

The element score is the first-order Taylor score ``|dL/dW * W|`` of GISP (arXiv 2510.18030, Eq. 8); a structure
scores the sum over its elements. Everything is summed in float32 in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import torch

from gisp_kernels import backend as backends
from gisp_kernels import checks
from gisp_kernels.ops import fusion, reference, wgrad_native

SUPPORTED = ("triton",)


def abs_weighted_reduce(
    weight: torch.Tensor,
    grad: torch.Tensor,
    *,
    axis: str = "row",
    block: int = 1,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum of ``|weight * grad|`` over every block of rows or columns.

    Args:
        weight: [O, I], float32, bfloat16 or float16, any strides.
        grad: [O, I], as ``weight``; its dtype may differ.
        axis: ``"row"``: structure ``s`` is rows ``s*block : (s+1)*block``; ``"column"``: those columns.
        block: rows or columns per structure; must divide the extent.
        out: float32 [count] to add to, or ``None`` for a new buffer.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        float32 [count]: ``out`` if given. Products and sums are float32 whatever the input dtypes.

    Raises:
        TypeError: unsupported dtype.
        ValueError: shapes, device, axis or block that do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    checks.check_matrix("weight", weight)
    checks.check_matrix("grad", grad)
    checks.check_same_shape("grad", grad, weight.shape)
    checks.check_same_device(weight=weight, grad=grad)
    out = checks.score_buffer(out, checks.structure_count(weight, axis, block), weight)
    choice = backends.resolve(backend, weight, SUPPORTED)
    run = abs_weighted_reduce_op if torch.compiler.is_compiling() else _abs_weighted_reduce
    run(out, weight.detach(), grad.detach(), axis, block, choice)
    return out


def wgrad_importance(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    axis: str = "row",
    block: int = 1,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum of ``|weight * G|`` over every block of rows or columns, ``G = grad_output.T @ input`` over all tokens.

    ``G`` is the weight gradient of a Linear layer. The Triton kernel consumes it tile by tile and never stores it.

    Args:
        grad_output: [..., O], gradient of the layer's output, any strides.
        input: [..., I], the layer's input, same leading shape and dtype as ``grad_output``.
        weight: [O, I]; its dtype may differ.
        axis, block, out: as in :func:`abs_weighted_reduce`.
        backend: ``None`` or ``"auto"`` to choose (on a GPU a fused kernel or a cuBLAS product and a reduction, by
            :func:`gisp_kernels.ops.fusion.plan`), ``"triton"`` for a fused kernel, ``"native"`` for the compiled one
            (16-bit, aligned rows, a Hopper GPU), ``"reference"`` for plain torch.

    Returns:
        float32 [count]: ``out`` if given.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`abs_weighted_reduce`.
    """
    checks.check_float("grad_output", grad_output)
    checks.check_float("input", input)
    checks.check_matrix("weight", weight)
    if grad_output.dtype != input.dtype:
        raise TypeError(f"grad_output is {grad_output.dtype} but input is {input.dtype}")
    if grad_output.dim() == 0 or grad_output.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            "grad_output and input must agree on all but the last dimension, "
            f"got {tuple(grad_output.shape)} and {tuple(input.shape)}"
        )
    checks.check_same_shape("weight", weight, (grad_output.shape[-1], input.shape[-1]))
    checks.check_same_device(weight=weight, grad_output=grad_output, input=input)
    out = checks.score_buffer(out, checks.structure_count(weight, axis, block), weight)
    dy, x = as_tokens(grad_output.detach()), as_tokens(input.detach())
    choice = _choose(backend, dy, x, weight.detach(), axis)
    run = wgrad_importance_op if torch.compiler.is_compiling() else _wgrad_importance
    run(out, dy, x, weight.detach(), axis, block, choice)
    return out


def _choose(
    backend: str | None, grad_output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, axis: str
) -> str:
    if backends.requested(backend) == "native":
        reason = wgrad_native.why_not(grad_output, input, [weight])
        if reason is not None:
            raise RuntimeError(f"backend 'native' cannot run here: {reason}")
        return "native"
    choice = backends.resolve(backend, weight, SUPPORTED)
    if choice != "triton":
        return choice
    if backends.is_auto(backend):
        return fusion.plan(grad_output, input, [weight], axis)
    return fusion.fused_kernel(grad_output, input, [weight], axis)[0]


def as_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """[..., features] as [tokens, features], also where features is 0."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


# Eager calls run these directly: going through the dispatcher costs about 100 us a call inside a backward pass, and a
# step makes hundreds.
def _abs_weighted_reduce(
    out: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, axis: str, block: int, choice: str
) -> None:
    if choice == "triton":
        from gisp_kernels.triton import abs_weighted_reduce as kernel

        kernel.launch(out, weight, grad, axis, block)
    else:
        reference.abs_weighted_reduce_(out, weight, grad, axis, block)


def _wgrad_importance(
    out: torch.Tensor,
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    axis: str,
    block: int,
    choice: str,
) -> None:
    if choice == "triton":
        from gisp_kernels.triton import wgrad_importance as kernel

        kernel.launch(out, grad_output, input, weight, axis, block)
    elif choice in ("tma", "native"):
        from gisp_kernels.triton import wgrad_tma

        layer = wgrad_tma.Layer(weight, 0, block, out)
        launch = wgrad_tma.launch if choice == "tma" else wgrad_native.launch
        launch(grad_output, input, [layer], axis, fusion.multiprocessors(input.device))
    elif choice == "matmul":
        from gisp_kernels.triton import abs_weighted_reduce as reduction

        reduction.launch(out, weight, reference.weight_grad(grad_output, input), axis, block)
    else:
        reference.wgrad_importance_(out, grad_output, input, weight, axis, block)


# Registered forms for tracing; arguments already validated, ``choice`` resolved as by
# :func:`gisp_kernels.ops.fusion.plan`.
abs_weighted_reduce_op = torch.library.custom_op(
    "gisp::abs_weighted_reduce_", _abs_weighted_reduce, mutates_args=("out",)
)
wgrad_importance_op = torch.library.custom_op("gisp::wgrad_importance_", _wgrad_importance, mutates_args=("out",))
