"""A pass through one Linear that is scored by rows and columns: recorders beside autograd and reductions after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.common.measure import Inputs
from benchmarks.common.registry import DENSE, HALF, REAL, Case, cases, quick_cases
from benchmarks.common.task import AUTO, EAGER, Implementation, Prepared, Task, random_matrix
from gisp_kernels import record_lines
from gisp_kernels.ops.products import weight_grad
from gisp_kernels.testing import Truth, assert_error_budget, reduce_truth, wgrad_truth

TOKENS = (2048, 8192)
QUICK_TOKENS = (8192,)
KEPT_GRAD, ONE_AXIS, AUTOGRAD = "kept gradient", "rows alone", "autograd alone"


def tasks(quick: bool) -> list[Task]:
    """Tasks of this file."""
    every = quick_cases()[1:3] if quick else [c for kept in (DENSE, HALF) for name in REAL for c in cases(name, kept)]
    return [_task(case, tokens) for tokens in (QUICK_TOKENS if quick else TOKENS) for case in every]


def _task(case: Case, tokens: int) -> Task:
    labels: dict[str, Any] = {"model": case.model, "projection": case.projection, "kept": case.kept}
    labels |= {"rows": case.rows, "width": case.width, "tokens": tokens}
    return Task("recording", labels, partial(_prepare, case.rows, case.width, tokens))


def _pass(linear: nn.Linear, x: torch.Tensor, grad: torch.Tensor) -> None:
    linear.weight.grad = None
    linear(x.detach().requires_grad_()).backward(grad)


def _recorded(linear: nn.Linear, keep_grad: bool, axes: tuple[str, ...]) -> Implementation:
    def run(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with record_lines([linear], axes, keep_grad=keep_grad) as recorder:  # type: ignore[arg-type]
            _pass(linear, x, grad)
        return torch.cat(list(recorder.scores().values()))

    return run


def _eager(linear: nn.Linear) -> Implementation:
    """Both sums as code around a backward pass writes them."""

    def run(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        _pass(linear, x, grad)
        assert linear.weight.grad is not None
        products = (linear.weight.detach().float() * linear.weight.grad.float()).abs()
        return torch.cat([products.sum(1), products.sum(0)])

    return run


def _check(weight: torch.Tensor, inputs: Inputs) -> Callable[[Implementation], None]:
    grad, x = inputs
    rounded = weight_grad(grad, x)
    axes = ("row", "column")
    expected = torch.cat([reduce_truth(weight, rounded, axis, 1).scores.float() for axis in axes])
    parts = [wgrad_truth(grad, x, weight, axis, 1) for axis in axes]
    truth = Truth(
        torch.cat([part.scores for part in parts]),
        torch.cat([part.magnitude for part in parts]),
        max(part.terms for part in parts),
    )
    return lambda implementation: assert_error_budget(implementation(*inputs), expected, truth)


def _prepare(rows: int, width: int, tokens: int) -> Prepared:
    inputs: Inputs = (random_matrix(tokens, rows), random_matrix(tokens, width))
    weight = random_matrix(rows, width)
    linear = nn.Linear(width, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return Prepared(
        inputs=inputs,
        implementations={
            AUTO: _recorded(linear, False, ("row", "column")),
            KEPT_GRAD: _recorded(linear, True, ("row", "column")),
            EAGER: _eager(linear),
        },
        check=_check(weight, inputs),
        baseline=EAGER,
        # Output, gradient of the input, gradient of the weight.
        flops=3 * 2 * tokens * rows * width,
        parts={
            AUTOGRAD: lambda grad, x: _pass(linear, x, grad),
            ONE_AXIS: _recorded(linear, False, ("row",)),
        },
    )
