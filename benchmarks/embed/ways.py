"""Ways to score every head and channel with one backward pass: ours, and what other stacks run.

A way is a context around a subject that gives a step: one pass that returns scores by group, float32 [structures].
Nothing but what a way itself needs gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.embed.subject import Subject
from gisp_kernels import Projection, StructureGroup, record_importance
from gisp_kernels.ops.importance import as_tokens
from gisp_kernels.ops.products import weight_grad

Scores = dict[str, torch.Tensor]
Step = Callable[[], Scores]
Way = Callable[[Subject], AbstractContextManager[Step]]

PASS = "pass alone"
PRODUCTS = "pass and weight products"
GRAD, STREAM = ".grad and eager sums", "record_importance"
GATE_PARAMETERS, GATE_GRADIENTS = "gate parameters", "gate gradients"


class _WithoutWeightGrad(torch.autograd.Function):
    """A linear layer that keeps its input as for a weight gradient and has none; ``anchor`` starts the graph.

    With ``product`` the gradient is formed by one matrix product and dropped.
    """

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, anchor: torch.Tensor, product: bool
    ) -> torch.Tensor:
        ctx.product = product
        ctx.save_for_backward(input, weight)
        return functional.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        if ctx.product:
            weight_grad(as_tokens(grads[0]), as_tokens(input))
        return grads[0].matmul(weight) if ctx.needs_input_grad[0] else None, None, None, None


@contextmanager
def _forwards(forwards: Mapping[nn.Linear, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Other forwards for layers."""
    for linear, forward in forwards.items():
        linear.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for linear in forwards:
            del linear.forward


def projections(groups: list[StructureGroup]) -> list[Projection]:
    """All scored layers."""
    return [projection for group in groups for projection in group.projections]


@contextmanager
def pass_alone(subject: Subject, product: bool = False) -> Iterator[Step]:
    """No scores: time and memory of a pass that keeps the inputs of scored layers and makes no weight gradient.

    With ``product`` it forms every weight gradient and reads none, which no way of scores of them can do without.
    """
    anchor = torch.zeros(0, device=subject.device, requires_grad=True)

    def step() -> Scores:
        subject.backward()
        return {}

    forwards = {
        p.linear: partial(_without_weight_grad, weight=p.linear.weight, anchor=anchor, product=product)
        for p in projections(subject.groups)
    }
    with _forwards(forwards):
        yield step


def _without_weight_grad(
    input: torch.Tensor, weight: torch.Tensor, anchor: torch.Tensor, product: bool
) -> torch.Tensor:
    output: torch.Tensor = _WithoutWeightGrad.apply(input, weight, anchor, product)
    return output


@contextmanager
def requiring_grad(groups: list[StructureGroup]) -> Iterator[list[torch.Tensor]]:
    """Scored weights require a gradient meanwhile; none is left behind."""
    weights = [projection.linear.weight for projection in projections(groups)]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)


@contextmanager
def plain_grad(subject: Subject) -> Iterator[Step]:
    """``loss.backward()``, then ``(w * w.grad).abs().sum()`` of every layer in plain torch."""
    with requiring_grad(subject.groups) as weights:

        def step() -> Scores:
            subject.backward()
            scores = {group.name: _eager_score(group) for group in subject.groups}
            for weight in weights:
                weight.grad = None
            return scores

        yield step


@torch.no_grad()
def _eager_score(group: StructureGroup) -> torch.Tensor:
    total = torch.zeros(group.count, device=group.projections[0].linear.weight.device)
    for projection in group.projections:
        weight, grad = projection.linear.weight, projection.linear.weight.grad
        assert grad is not None
        lines = (weight * grad).abs().sum(1 if projection.axis == "row" else 0, dtype=torch.float32)
        total += lines.view(group.count, -1).sum(1)
    return total


@contextmanager
def stream(subject: Subject) -> Iterator[Step]:
    """:func:`gisp_kernels.record_importance`: the same scores, no weight gradient kept."""
    with record_importance(subject.groups) as recorder:

        def step() -> Scores:
            recorder.reset()
            subject.backward()
            return recorder.scores()

        yield step


def output_projections(groups: list[StructureGroup]) -> dict[str, Projection]:
    """Where structures leave their block: o_proj and down_proj, by group."""
    return {g.name: next(p for p in g.projections if p.axis == "column") for g in groups}


@contextmanager
def gate_parameters(subject: Subject) -> Iterator[Step]:
    """A gate of 1 on every structure, multiplied onto what its output projection reads; autograd makes the gradient."""
    outputs = output_projections(subject.groups)
    gates = {
        name: nn.Parameter(torch.ones(p.width // p.block, dtype=p.linear.weight.dtype, device=subject.device))
        for name, p in outputs.items()
    }

    def step() -> Scores:
        subject.backward()
        scores: Scores = {}
        for name, gate in gates.items():
            assert gate.grad is not None
            scores[name], gate.grad = gate.grad.float(), None
        return scores

    with _forwards({p.linear: partial(_gated, projection=p, gate=gates[name]) for name, p in outputs.items()}):
        yield step


def _gated(input: torch.Tensor, projection: Projection, gate: torch.Tensor) -> torch.Tensor:
    if projection.block > 1:
        gated = (input.unflatten(-1, (-1, projection.block)) * gate[:, None]).flatten(-2)
    else:
        gated = input * gate
    return functional.linear(gated, projection.linear.weight, projection.linear.bias)


@contextmanager
def gate_gradients(subject: Subject) -> Iterator[Step]:
    """The gradients of those gates by :func:`gisp_kernels.record_importance`, without gates."""
    with record_importance(subject.groups, mode="second-order") as recorder:

        def step() -> Scores:
            recorder.reset()
            subject.backward()
            return {name: sums[0].float() for name, sums in recorder.gate_sums().items()}

        yield step


# Way -> what makes its scores, and the way that makes the same ones in plain torch.
WAYS: dict[str, tuple[Way, str | None]] = {
    PASS: (pass_alone, None),
    PRODUCTS: (partial(pass_alone, product=True), None),
    GRAD: (plain_grad, GRAD),
    STREAM: (stream, GRAD),
    GATE_PARAMETERS: (gate_parameters, GATE_PARAMETERS),
    GATE_GRADIENTS: (gate_gradients, GATE_PARAMETERS),
}
