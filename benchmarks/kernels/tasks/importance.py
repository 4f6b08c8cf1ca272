"""Importance ops on real shapes: the score of a weight gradient, of several that share an input, and the reduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from benchmarks.common.measure import Inputs
from benchmarks.common.registry import (
    DENSE,
    HALF,
    MIDWAY,
    MODELS,
    REAL,
    TOKENS,
    Case,
    cases,
    kept_channels,
    kept_heads,
    odd_cases,
    quick_cases,
)
from benchmarks.common.task import AUTO, COMPILED, EAGER, Implementation, Prepared, Task, random_matrix
from gisp_kernels import abs_weighted_reduce, wgrad_importance
from gisp_kernels.ops.grouped import ScoredMatrix, grouped_abs_weighted_reduce
from gisp_kernels.ops.importance import StackedLinear, stacked_wgrad_importance
from gisp_kernels.ops.products import weight_grad
from gisp_kernels.ops.wgrad import native_why_not
from gisp_kernels.testing import Truth, assert_error_budget, reduce_truth, wgrad_truth

QUICK_TOKENS = (512, 2048, 8192)
STEP_TOKENS = 8192
CUBLAS, CUBLAS_EAGER = "cublas alone", "cublas + eager"
CUBLAS_COMPILED, CUBLAS_OURS = "cublas + compiled", "cublas + ours"


def tasks(quick: bool) -> list[Task]:
    """Tasks of this file, the most telling first: a run that is cut short has those."""
    every = [case for kept in (DENSE, HALF) for name in REAL for case in cases(name, kept)]
    if quick:
        found = [_wgrad(case, tokens) for tokens in QUICK_TOKENS for case in quick_cases()[1:3]]
        found += [_stacked("llama-2-13b", "qkv", DENSE, 512), _stacked("llama-2-13b", "gate+up", DENSE, STEP_TOKENS)]
        return found + [_reduction(case) for case in quick_cases()] + [_layer("llama-2-13b", HALF)]
    midway = [case for name in REAL for case in cases(name, MIDWAY)]
    found = [_reduction(case) for case in every] + [_layer(name, kept) for kept in (DENSE, HALF) for name in REAL]
    found += [_wgrad(case, tokens) for tokens in TOKENS for case in every]
    found += [
        _stacked(name, stack, kept, tokens)
        for tokens in TOKENS
        for kept in (DENSE, HALF)
        for name, stack in (("llama-2-13b", "qkv"), ("llama-2-13b", "gate+up"), ("llama-3-8b", "gate+up"))
    ]
    found += [_wgrad(case, STEP_TOKENS) for case in (*midway, *odd_cases())]
    return found + [_reduction(case) for case in (*midway, *odd_cases())]


def reduce_eager(weight: torch.Tensor, grad: torch.Tensor, axis: str, block: int) -> torch.Tensor:
    """The reduction as plain PyTorch writes it."""
    lines = (weight.float() * grad.float()).abs().sum(dim=1 if axis == "row" else 0)
    return lines.view(-1, block).sum(dim=1)


reduce_compiled = torch.compile(reduce_eager, dynamic=True)


def reductions(case: Case) -> dict[str, Implementation]:
    """Implementations of the reduction alone: (weight, grad) to scores."""
    axis, block = case.axis, case.block
    return {
        AUTO: lambda w, g: abs_weighted_reduce(w, g, axis=axis, block=block),
        COMPILED: lambda w, g: reduce_compiled(w, g, axis, block),
        EAGER: lambda w, g: reduce_eager(w, g, axis, block),
    }


def wgrad_implementations(case: Case) -> dict[str, Implementation]:
    """Implementations of the scores from activations: (grad_output, input, weight) to scores."""
    axis, block = case.axis, case.block
    ours = partial(wgrad_importance, axis=axis, block=block)
    reduction = partial(abs_weighted_reduce, axis=axis, block=block)
    return {
        AUTO: ours,
        "native": partial(ours, backend="native"),
        "triton": partial(ours, backend="triton"),
        CUBLAS_OURS: lambda dy, x, w: reduction(w, weight_grad(dy, x)),
        CUBLAS_COMPILED: lambda dy, x, w: reduce_compiled(w, dy.t() @ x, axis, block),
        CUBLAS_EAGER: lambda dy, x, w: reduce_eager(w, dy.t() @ x, axis, block),
    }


def within_budget(inputs: Inputs, expected: torch.Tensor, truth: Truth) -> Callable[[Implementation], None]:
    """A check of scores: an implementation may err as much as ``expected`` does, and a step more."""
    return lambda implementation: assert_error_budget(implementation(*inputs), expected, truth)


def _wgrad(case: Case, tokens: int) -> Task:
    return Task("wgrad_importance", {**asdict(case), "tokens": tokens}, partial(_prepare_wgrad, case, tokens))


def _prepare_wgrad(case: Case, tokens: int) -> Prepared:
    dy, x, weight = random_matrix(tokens, case.rows), random_matrix(tokens, case.width), random_matrix(*_shape(case))
    implementations = wgrad_implementations(case)
    if native_why_not(dy, x, [weight]) is not None:
        del implementations["native"]
    expected = wgrad_importance(dy, x, weight, axis=case.axis, block=case.block, backend="reference")
    truth = wgrad_truth(dy, x, weight, case.axis, case.block)
    return Prepared(
        inputs=(dy, x, weight),
        implementations=implementations,
        check=within_budget((dy, x, weight), expected, truth),
        baseline=CUBLAS_EAGER,
        flops=2 * tokens * case.rows * case.width,
        parts={CUBLAS: lambda dy, x, w: dy.t() @ x},
    )


def _reduction(case: Case) -> Task:
    return Task("abs_weighted_reduce", asdict(case), partial(_prepare_reduction, case))


def _prepare_reduction(case: Case) -> Prepared:
    weight, grad = random_matrix(*_shape(case)), random_matrix(*_shape(case))
    truth = reduce_truth(weight, grad, case.axis, case.block)
    return Prepared(
        inputs=(weight, grad),
        implementations=reductions(case),
        check=within_budget((weight, grad), truth.scores.float(), truth),
        baseline=EAGER,
        # W and G, each read once.
        bytes=2 * weight.numel() * weight.element_size(),
    )


def _layer(model_name: str, kept: float) -> Task:
    labels = {"model": model_name, "projection": "layer", "kept": kept}
    return Task("layer_reduce", labels, partial(_prepare_layer, model_name, kept))


def _prepare_layer(model_name: str, kept: float) -> Prepared:
    """All matrices of a layer whose weight gradients are there: scores of its heads and of its channels."""
    shapes = {case.projection: case for case in cases(model_name, kept)}
    attention = ["q", "o"] if MODELS[model_name].shares_kv else ["qkv", "qkv", "qkv", "o"]
    groups = [[shapes[name] for name in names] for names in (attention, ["gate/up", "gate/up", "down"])]
    parts = [(case, number) for number, group in enumerate(groups) for case in group]
    inputs = tuple(random_matrix(*_shape(case)) for _ in range(2) for case, _ in parts)

    def matrices(tensors: Inputs, outs: list[torch.Tensor]) -> list[ScoredMatrix]:
        weights, grads = tensors[: len(parts)], tensors[len(parts) :]
        return [
            ScoredMatrix(w, g, outs[number], case.axis, case.block)
            for (case, number), w, g in zip(parts, weights, grads, strict=True)
        ]

    def summed(reduce: Callable[[ScoredMatrix], torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        found = [reduce(matrix) for matrix in matrices(tensors, [tensors[0]] * len(groups))]
        own = [[part for part, (_, owner) in zip(found, parts, strict=True) if owner == n] for n in range(len(groups))]
        return torch.cat([sum(rest, start=first) for first, *rest in own])

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        outs = [torch.empty(_count(group[0]), device=tensors[0].device) for group in groups]
        grouped_abs_weighted_reduce(matrices(tensors, outs), add=False)
        return torch.cat(outs)

    truths = [reduce_truth(m.weight, m.grad, m.axis, m.block) for m in matrices(inputs, [inputs[0]] * len(groups))]
    by_group = [[t for t, (_, owner) in zip(truths, parts, strict=True) if owner == n] for n in range(len(groups))]
    scores = torch.cat([torch.stack([truth.scores for truth in own]).sum(0) for own in by_group])
    truth = Truth(scores, scores, max(sum(truth.terms for truth in own) for own in by_group))
    return Prepared(
        inputs=inputs,
        implementations={
            AUTO: ours,
            "one by one": partial(summed, lambda m: abs_weighted_reduce(m.weight, m.grad, axis=m.axis, block=m.block)),
            COMPILED: partial(summed, lambda m: reduce_compiled(m.weight, m.grad, m.axis, m.block)),
            EAGER: partial(summed, lambda m: reduce_eager(m.weight, m.grad, m.axis, m.block)),
        },
        check=within_budget(inputs, scores.float(), truth),
        baseline=EAGER,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in inputs),
    )


def _count(case: Case) -> int:
    return (case.rows if case.axis == "row" else case.width) // case.block


def _stacked(model_name: str, stack: str, kept: float, tokens: int) -> Task:
    model = MODELS[model_name]
    layers = 3 if stack == "qkv" else 2
    block = model.head_dim if stack == "qkv" else 1
    rows = kept_heads(model, kept) * model.head_dim if stack == "qkv" else kept_channels(model, kept)
    case = Case(model_name, stack, layers * rows, model.hidden, "row", block, kept)
    prepare = partial(_prepare_stacked, case, layers, tokens)
    return Task("stacked_wgrad", {**asdict(case), "tokens": tokens}, prepare)


def _prepare_stacked(case: Case, layers: int, tokens: int) -> Prepared:
    rows, block = case.rows // layers, case.block
    dy, x, weight = random_matrix(tokens, case.rows), random_matrix(tokens, case.width), random_matrix(*_shape(case))

    def ours(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(rows // block, device=w.device)
        layers = [StackedLinear(i * rows, own, block, out) for i, own in enumerate(w.split(rows))]
        stacked_wgrad_importance(dy, x, layers)
        return out

    def apart(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(rows // block, device=w.device)
        for part, own in zip(w.split(rows), dy.split(rows, dim=1), strict=True):
            wgrad_importance(own, x, part, block=block, out=out)
        return out

    def summed(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return reduce_eager(w, dy.t() @ x, "row", block).view(layers, -1).sum(0)

    single = wgrad_truth(dy, x, weight, "row", block)
    scores, magnitude = (values.view(layers, -1).sum(0) for values in (single.scores, single.magnitude))
    truth = Truth(scores, magnitude, single.terms * layers)
    expected = wgrad_importance(dy, x, weight, block=block, backend="reference").view(layers, -1).sum(0)
    return Prepared(
        inputs=(dy, x, weight),
        implementations={AUTO: ours, "one by one": apart, CUBLAS_EAGER: summed},
        check=within_budget((dy, x, weight), expected, truth),
        baseline=CUBLAS_EAGER,
        flops=2 * tokens * case.rows * case.width,
        parts={CUBLAS: lambda dy, x, w: dy.t() @ x},
    )


def _shape(case: Case) -> tuple[int, int]:
    return case.rows, case.width
