"""Training towards the dense model: one factor a kept structure (``gates``), or output projections too (``distil``).

The loss is ``KL(dense || pruned)`` of the next token, all other weights are frozen. A gate multiplies what a head or a
channel sends through o_proj or down_proj. Its gradient is ``sum X * dX`` (:func:`gisp_kernels.gate_grads`): no weight
gradient is formed. Gates are folded into the weights. ``distil`` also trains the kept columns of the weights, float32
copies of them. Adam (Kingma and Ba, arXiv 1412.6980) takes steps at a rate that rises over the first ones and falls to
0 along a cosine. The divergence on held-out text is watched, and the lowest point that counts is what stays. Where the
end of training breaks a limit of :mod:`gisp.compensation.acceptance`, a part of the way there is searched, as for fits:
a model pruned by the loss on some text can be better at it than the dense one, and half the way may cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gisp.compensation.acceptance import HeldOut, Measured, MethodResult
from gisp.compensation.options import METHODS
from gisp.compensation.pruned.projections import Projection, Traced, Value
from gisp.compensation.pruned.student import Student
from gisp.compensation.size_search import search
from gisp.data import Row
from gisp.progress import track
from gisp.replicas.sharing import in_slices, sharers

_WARM_UP = 10
# So many times a method the held-out divergence is measured.
_WATCHED = 10
# The part of the way that is tried first where the whole of it breaks a limit.
_FIRST_SIZE = 0.5


@dataclass(frozen=True)
class Plan:
    """How a method trains.

    Attributes:
        name: ``gates`` or ``distil``.
        steps: optimizer steps.
        gate_rate: highest learning rate of gates.
        weight_rate: highest learning rate of weights; 0 leaves them frozen.
        batch_tokens: tokens of a step.
    """

    name: str
    steps: int
    batch_tokens: int
    gate_rate: float = METHODS["gates"].rate
    weight_rate: float = 0.0


def run_training(
    student: Student, rows: Sequence[Row], held_out: HeldOut, start: Measured, plan: Plan
) -> tuple[MethodResult, Measured]:
    """Train a student's gates, and with a rate its weights; it keeps the point with the lowest held-out divergence.

    Memory beside the student: a batch's activations for a backward pass and the best weights in the dtype of the model;
    with weights also their gradients and two moments in float32. Time per step: two forward passes and a backward pass;
    a forward pass over the held-out text at ten points, and for every size that is searched.

    Args:
        rows: calibration rows, taken in another order every time they are gone through.
        start: the student on held-out text.

    Returns:
        The result, and what it leaves behind.
    """
    trained = _Trained(student, weights=plan.weight_rate > 0)
    optimizer = torch.optim.Adam(
        [{"params": trained.gates, "lr": plan.gate_rate}]
        + ([{"params": trained.weights, "lr": plan.weight_rate}] if trained.weights else []),
        fused=student.device.type == "cuda",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, plan.steps))
    best, kept, count, size, seen = start, None, 0, 1.0, 0
    found = start
    every = math.ceil(plan.steps / _WATCHED)
    steps = _steps(rows, plan.batch_tokens)
    for number in track(range(1, plan.steps + 1), "training steps"):
        chosen = next(steps)
        tokens = sum(len(ids) for ids, _ in chosen)
        trained.take_gradients(student, chosen, 1 / tokens)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen += tokens
        if number % every and number != plan.steps:
            continue
        point = trained.point()
        found = student.measure(held_out, point.values.__getitem__)
        if bool(found.divergences.isnan().any()):
            break
        if found.total < best.total:
            kept, best, count = point, found, number
    if any(excess > 0 for excess in found.excess):
        # The end breaks a limit: a part of the way there may not.
        part, reached = search(
            lambda part: student.measure(held_out, trained.point(part).values.__getitem__),
            _FIRST_SIZE,
            start,
            most=1.0,
        )
        if reached.total < best.total:
            kept, best, count, size = trained.point(part), reached, plan.steps, part
    result = MethodResult.ended(plan.name, seen, held_out, start, best, count=count, size=size)
    if not result.kept or kept is None:
        return result, start
    trained.take(kept)
    return result, best


def rate(step: int, steps: int) -> float:
    """Part of the highest learning rate in a step: a rise over at most 10 steps, then a cosine to 0."""
    warm_up = min(_WARM_UP, steps // 4)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def _steps(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Rows of step after step, at least ``tokens`` tokens or all rows once; every round in an order of its own."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    while True:
        chosen: list[Row] = []
        left = tokens
        while left > 0 and len(chosen) < len(rows):
            if not order:
                order = torch.randperm(len(rows), generator=generator).tolist()
            chosen.append(rows[order.pop()])
            left -= len(chosen[-1][0])
        yield chosen


class _Point(NamedTuple):
    """A point of training.

    Attributes:
        values: of all projections.
        gates: of all projections, float32 [K / block]; None where no column is left.
    """

    values: list[Value]
    gates: list[torch.Tensor | None]


class _Trained:
    """The tensors that are trained, float32: gates of every projection and, where asked for, its kept columns."""

    def __init__(self, student: Student, *, weights: bool) -> None:
        self._projections = student.projections
        self.gates = [
            torch.ones(len(p.columns) // p.block, dtype=torch.float32, device=student.device, requires_grad=True)
            for p in student.movable
        ]
        self.weights = [p.weight.clone().requires_grad_() for p in student.movable] if weights else []

    def _each(self) -> Iterator[tuple[Projection, torch.Tensor | None, torch.Tensor | None]]:
        """Every projection with its gates and its trained weight, None where there is none."""
        gates, weights = iter(self.gates), iter(self.weights)
        for projection in self._projections:
            if len(projection.columns):
                yield projection, next(gates), next(weights, None)
            else:
                yield projection, None, None

    def take_gradients(self, student: Student, rows: Sequence[Row], scale: float) -> None:
        """Give every tensor the gradient of the divergence over rows, times ``scale``, as its ``grad``."""
        parameters, slices = [*self.gates, *self.weights], in_slices(rows)

        def fill(number: int, sums: Sequence[torch.Tensor]) -> None:
            for parameter, gradient in zip(parameters, sums, strict=True):
                parameter.grad = gradient
            student.backward(slices[number], [Traced(weight, gates) for _, gates, weight in self._each()], scale)

        totals = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        sharers().add_up(totals, len(slices), fill)
        for parameter, total in zip(parameters, totals, strict=True):
            parameter.grad = total

    @torch.no_grad()
    def point(self, size: float = 1.0) -> _Point:
        """Where training is, or a part of the way there: gates, and what the projections are with these folded in."""
        values, gates = [], []
        for projection, factors, weight in self._each():
            value = projection.value()
            if factors is not None:
                own = projection.weight
                factors = torch.lerp(torch.ones_like(factors), factors, size)
                moved = own if weight is None else torch.lerp(own, weight, size)
                folded = moved * factors.repeat_interleave(projection.block)
                value = value._replace(weight=folded.to(value.weight.dtype))
            values.append(value)
            gates.append(factors)
        return _Point(values, gates)

    def take(self, point: _Point) -> None:
        """Let the projections compute with a point's values."""
        for projection, value, factors in zip(self._projections, *point, strict=True):
            if factors is not None:
                projection.factors = None if self.weights or projection.reweighted else factors
                projection.weight.copy_(value.weight)
                projection.reweighted = True
