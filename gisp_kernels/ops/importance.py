"""First-order importance of structures: sums of ``|W * dL/dW|`` over blocks of rows or columns of a weight.

The element score is the first-order Taylor score ``|dL/dW * W|`` of GISP (arXiv 2510.18030, Eq. 8), or its square, the
empirical Fisher term ``W^2 * (dL/dW)^2`` of LLM-Pruner (arXiv 2305.11627, ``param_second``); a structure scores the sum
over its elements. Everything is summed in float32 in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gisp_kernels import backend as backends
from gisp_kernels import checks
from gisp_kernels.ops import wgrad
from gisp_kernels.ops.grouped import ScoredMatrix, add_sums, grouped_abs_weighted_reduce
from gisp_kernels.ops.products import weight_grad


@dataclass(frozen=True)
class StackedLinear:
    """One of several Linear layers that read one input, their output gradients side by side.

    Attributes:
        start: first column of the gradients that belongs to the layer.
        weight: [O, I]; the layer owns columns ``start : start + O``.
        block: rows per structure; must divide O.
        out: float32 [O / block] the scores are added to.
    """

    start: int
    weight: torch.Tensor
    block: int
    out: torch.Tensor

    @property
    def stop(self) -> int:
        """The column after the layer's last one."""
        return self.start + self.weight.shape[0]


def abs_weighted_reduce(
    weight: torch.Tensor,
    grad: torch.Tensor,
    *,
    axis: str = "row",
    block: int = 1,
    power: int = 1,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum of ``|weight * grad| ** power`` over every block of rows or columns.

    Args:
        weight: [O, I], float32, bfloat16 or float16, any strides.
        grad: [O, I], as ``weight``; its dtype may differ.
        axis: ``"row"``: structure ``s`` is rows ``s*block : (s+1)*block``; ``"column"``: those columns.
        block: rows or columns per structure; must divide the extent.
        power: 1 or 2.
        out: float32 [count] to add to, or ``None`` for a new buffer.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        float32 [count]: ``out`` if given. Products and sums are float32 whatever the input dtypes.

    Raises:
        TypeError: unsupported dtype.
        ValueError: shapes, device, axis, block or power that do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    checks.check_matrix("weight", weight)
    checks.check_matrix("grad", grad)
    checks.check_power(power)
    checks.check_same_shape("grad", grad, weight.shape)
    checks.check_same_device(weight=weight, grad=grad)
    out = checks.score_buffer(out, checks.structure_count(weight, axis, block), weight)
    choice = backends.resolve(backend, weight)
    run = abs_weighted_reduce_op if torch.compiler.is_compiling() else _abs_weighted_reduce
    run(out, weight.detach(), grad.detach(), axis, block, choice, power)
    return out


def wgrad_importance(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    axis: str = "row",
    block: int = 1,
    power: int = 1,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum of ``|weight * G| ** power`` over every block of rows or columns, ``G = grad_output.T @ input``.

    ``G`` is the weight gradient of a Linear layer over all tokens. The fused kernels consume it tile by tile and never
    store it. They sum the first power alone: with ``power`` 2 a matrix product forms ``G`` and a reduction squares it.

    Args:
        grad_output: [..., O], gradient of the layer's output, any strides.
        input: [..., I], the layer's input, same leading shape and dtype as ``grad_output``.
        weight: [O, I]; its dtype may differ.
        axis, block, power, out: as in :func:`abs_weighted_reduce`.
        backend: ``None`` or ``"auto"`` to choose (on a GPU a fused kernel or a cuBLAS product and a reduction, by
            :func:`gisp_kernels.ops.wgrad.plan`), ``"triton"`` for a fused kernel, ``"native"`` for the compiled one
            (16-bit, aligned rows, a Hopper GPU, ``power`` 1), ``"reference"`` for plain torch.

    Returns:
        float32 [count]: ``out`` if given.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`abs_weighted_reduce`.
    """
    checks.check_power(power)
    out = _checked_out(grad_output, input, weight, axis, block, out)
    dy, x = as_tokens(grad_output.detach()), as_tokens(input.detach())
    if power == 1:
        _score([out], dy, x, [weight.detach()], [0], [block], axis, backend)
        return out
    choice = "matmul" if backends.resolve(backend, x) == "triton" else "reference"
    run = wgrad_importance_op if torch.compiler.is_compiling() else _wgrad_importance
    run([out], dy, x, [weight.detach()], [0], [block], axis, choice, power)
    return out


def stacked_wgrad_importance(
    grad_output: torch.Tensor, input: torch.Tensor, layers: Sequence[StackedLinear], *, backend: str | None = None
) -> None:
    """:func:`wgrad_importance` by rows of several layers that read one input, added to the ``out`` of each.

    Query, key and value projections, or gate and up, share their input. Side by side their weight gradients are one
    larger matrix product, which fills a GPU better than two or three small ones.

    Args:
        grad_output: [T, columns], the layers' output gradients side by side.
        input: [T, I], what all the layers read, same dtype.
        layers: by ascending start; columns that belong to none are not scored.
        backend: as in :func:`wgrad_importance`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`wgrad_importance`.
    """
    for layer in layers:
        _checked_out(grad_output[:, layer.start : layer.stop], input, layer.weight, "row", layer.block, layer.out)
    layers = [layer for layer in layers if layer.weight.numel()]
    if layers:
        first = layers[0].start
        _score(
            [layer.out for layer in layers],
            grad_output[:, first : layers[-1].stop].detach(),
            input.detach(),
            [layer.weight.detach() for layer in layers],
            [layer.start - first for layer in layers],
            [layer.block for layer in layers],
            "row",
            backend,
        )


def _checked_out(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    axis: str,
    block: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Validate the operands of a layer; ``out`` or fresh zeros."""
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
    return checks.score_buffer(out, checks.structure_count(weight, axis, block), weight)


def _score(
    outs: list[torch.Tensor],
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weights: list[torch.Tensor],
    starts: list[int],
    blocks: list[int],
    axis: str,
    backend: str | None,
) -> None:
    """Add the scores of checked layers, all at once or, where :func:`gisp_kernels.ops.wgrad.choose` says so, one by
    one."""
    choice = wgrad.choose(grad_output, input, weights, axis, backend)
    if choice == "apart":
        for out, weight, start, block in zip(outs, weights, starts, blocks, strict=True):
            own = grad_output[:, start : start + weight.shape[0]]
            _score([out], own, input, [weight], [0], [block], axis, backend)
        return
    run = wgrad_importance_op if torch.compiler.is_compiling() else _wgrad_importance
    run(outs, grad_output, input, weights, starts, blocks, axis, choice)


def as_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """[..., features] as [tokens, features], also where features is 0."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


# Eager calls run these directly: going through the dispatcher costs about 100 us a call inside a backward pass, and a
# step makes hundreds.
def _abs_weighted_reduce(
    out: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, axis: str, block: int, choice: str, power: int = 1
) -> None:
    if choice == "triton":
        from gisp_kernels.triton import abs_weighted_reduce as kernel

        kernel.launch(out, weight, grad, axis, block, power)
    else:
        add_sums(ScoredMatrix(weight, grad, out, axis, block), power)


def _wgrad_importance(
    outs: list[torch.Tensor],
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weights: list[torch.Tensor],
    starts: list[int],
    blocks: list[int],
    axis: str,
    choice: str,
    power: int = 1,
) -> None:
    if choice not in ("reference", "matmul"):
        wgrad.add_fused(outs, grad_output, input, weights, starts, blocks, axis, choice)
        return
    gradient = weight_grad(grad_output, input)
    reduction = "reference" if choice == "reference" else "triton"
    parts = [gradient[start : start + weight.shape[0]] for start, weight in zip(starts, weights, strict=True)]
    if len(weights) == 1:
        _abs_weighted_reduce(outs[0], weights[0], parts[0], axis, blocks[0], reduction, power)
        return
    grouped_abs_weighted_reduce(
        [
            ScoredMatrix(weight, part, out, axis, block)
            for weight, part, out, block in zip(weights, parts, outs, blocks, strict=True)
        ],
        power=power,
        backend=reduction,
    )


# Tracing needs registered forms. They get validated arguments and a ``choice`` as of
# :func:`gisp_kernels.ops.wgrad.choose`.
abs_weighted_reduce_op = torch.library.custom_op(
    "gisp::abs_weighted_reduce_", _abs_weighted_reduce, mutates_args=("out",)
)
wgrad_importance_op = torch.library.custom_op("gisp::wgrad_importance_", _wgrad_importance, mutates_args=("outs",))
