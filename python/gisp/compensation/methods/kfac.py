"""K-FAC steps: output projections moved towards the dense model's predictions.

Least squares brings outputs of blocks back, whichever deviations the loss minds. A step here lowers the loss itself,
the divergence ``KL(dense || pruned)`` of the next token's distribution, which needs no labels. For an output projection
with kept inputs ``X`` [T, K] and gradients ``g`` [T, D] of the divergence in its outputs it is the gradient step with
K-FAC's factors, the empirical Fisher information of these gradients (Martens and Grosse, arXiv 1503.05671; for pruned
language models LLM Surgeon, arXiv 2312.17244)::

    dW = -s (G + lambda_G I)^-1 C (A + lambda_A I)^-1,   A = X^T X / T,  G = g^T g / T,  C = g^T X / T

with every ``lambda`` the damping times the mean diagonal. All blocks move at once. As their steps add up, one size
``s`` for all of them is searched on held-out text, and is 0 where none helps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch

from gisp.compensation.acceptance import HeldOut, Measured, MethodResult, Step
from gisp.compensation.methods.fits import ridge
from gisp.compensation.pruned.projections import NO_MOVE, Move, Observer, Projection, Traced
from gisp.compensation.pruned.student import Student
from gisp.compensation.size_search import search
from gisp.data import Row
from gisp.errors import GispError
from gisp.progress import track
from gisp.replicas.sharing import in_slices, sharers
from gisp_kernels.ops.products import add_product, product_total

# The first size tried, divided by the number of blocks.
_FIRST_SIZE = 0.5
# Rows of a symmetric moment that one product makes: wide enough for full tiles of a GPU.
_PANEL = 1792


def run_kfac(
    student: Student,
    rows: Sequence[Row],
    held_out: HeldOut,
    start: Measured,
    *,
    begin: int,
    tokens: int,
    steps: int,
    damping: float,
    later: int = 0,
) -> tuple[MethodResult, Measured]:
    """Move a student by ``steps`` steps; what lost nothing stays as it was.

    Every step takes the next ``tokens`` tokens behind those before it, from the start again where the rows end. Memory
    beside the student: its moves in float32, ``K*K + D*D`` floats per block and a batch's activations for a backward
    pass. Time per step: two forward passes and a backward pass without weight gradients, and per size tried one forward
    pass over the held-out text.

    Args:
        rows: calibration rows.
        start: the student on held-out text.
        begin: number of the row the first step begins with.
        later: methods that follow. Every step leaves them and the steps behind it their part of what the limits allow.

    Returns:
        The result, and what it leaves behind.

    Raises:
        GispError: activations that are not finite.
    """
    before = start
    done: list[Step] = []
    size = 0.0
    for left in track(range(steps + later, later, -1), "K-FAC steps"):
        end = behind(rows, begin, tokens)
        chosen = [rows[number % len(rows)] for number in range(begin, end)]
        seen = sum(len(ids) for ids, _ in chosen)
        moves, dampings = _directions(student, chosen, damping)

        def tried(size: float, moves: list[Move] = moves) -> Measured:
            return student.measure(held_out, student.moved(moves, size))

        size, after = search(tried, size or _FIRST_SIZE / len(dampings), before, share=1 / left)
        if held_out.difference(before, after).falls:
            student.move(moves, size)
        else:
            size, after = 0.0, before
        raised = sum(needed > damping for needed in dampings)
        done.append(Step(size, seen, held_out.mean(before), held_out.mean(after), max(dampings), raised))
        before, begin = after, end
    seen = sum(step.tokens for step in done)
    return MethodResult.ended("kfac", seen, held_out, start, before, steps=tuple(done)), before


def behind(rows: Sequence[Row], begin: int, tokens: int) -> int:
    """Number of the row behind ``tokens`` tokens from row ``begin`` on, at least one row and at most all of them."""
    end = begin
    while end < begin + len(rows) and tokens > 0:
        tokens -= len(rows[end % len(rows)][0])
        end += 1
    return end


class _Moments:
    """Second moments of one projection's kept inputs and output gradients: A [K, K], G [D, D], C [D, K], float32.

    Of A and G the factorisation reads the lower triangle; what is above it need not be there.
    They make a direction whose size is searched, and tolerate the bits that products of 16-bit factors drop.
    """

    def __init__(self, projection: Projection) -> None:
        self.rows, self.columns = projection.weight.shape
        self._device, home = projection.device, projection.weight.device
        self.inputs, self.outputs, self.cross = (
            product_total(m, n, self._device).to(home)
            for m, n in ((self.columns, self.columns), (self.rows, self.rows), (self.rows, self.columns))
        )

    @property
    def sums(self) -> list[torch.Tensor]:
        return [self.inputs, self.outputs, self.cross]

    def holding(self, sums: Iterable[torch.Tensor]) -> _Moments:
        """The same moments in other sums, which they add to in place."""
        other = copy.copy(self)
        other.inputs, other.outputs, other.cross = sums
        return other

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Take in tokens: inputs [T, K], gradients [T, D], in the model's dtype."""
        _add_lower(self.inputs, inputs)
        _add_lower(self.outputs, gradients)
        add_product(self.cross, gradients, inputs)

    @contextmanager
    def observing(self) -> Iterator[Observer]:
        """What takes in tokens while its layer is passed; moments in host memory are on the device meanwhile."""
        here = self.holding(total.to(self._device) for total in self.sums)
        yield here.add
        for total, found in zip(self.sums, here.sums, strict=True):
            if found is not total:
                total.copy_(found)

    def direction(self, tokens: int, damping: float) -> tuple[torch.Tensor, float]:
        """The step of size 1, float32 [D, K], and the larger of the two dampings it took."""
        rows, columns = self.rows, self.columns
        inputs, outputs, cross = (total.to(self._device) for total in self.sums)
        half, one = ridge(
            inputs[:columns, :columns].double() / tokens, cross[:rows, :columns].double() / tokens, damping
        )
        whole, other = ridge(outputs[:rows, :rows].double() / tokens, half.T, damping)
        return -whole.T.float(), max(one, other)


def _add_lower(total: torch.Tensor, factor: torch.Tensor) -> None:
    """Add ``factor.T @ factor``, factor [T, n], to the lower triangle of a total; above it some is added, some not."""
    for start in range(0, factor.shape[1], _PANEL):
        stop = start + _PANEL
        add_product(total[start:stop, :stop], factor[:, start:stop], factor[:, :stop])


def _directions(student: Student, rows: Sequence[Row], damping: float) -> tuple[list[Move], list[float]]:
    """Steps of size 1 of all blocks, and the dampings of those that have columns left."""
    tokens, slices = sum(len(ids) for ids, _ in rows), in_slices(rows)
    # Each moment gives way to the step it makes.
    found: list[_Moments | None] = [_Moments(p) if len(p.columns) else None for p in student.projections]

    def fill(number: int, sums: Sequence[torch.Tensor]) -> None:
        given = iter(sums)
        traced = [
            Traced(observing=moments.holding(islice(given, len(moments.sums))).observing) if moments else Traced()
            for moments in found
        ]
        student.backward(slices[number], traced, 1.0)

    sharers().add_up([total for moments in found if moments for total in moments.sums], len(slices), fill)
    moves: list[Move] = []
    dampings: list[float] = []
    for number, projection in enumerate(student.projections):
        moments, found[number] = found[number], None
        if moments is None:
            moves.append(NO_MOVE)
            continue
        try:
            direction, needed = moments.direction(tokens, damping)
        except ArithmeticError as error:
            raise GispError(f"{projection.name} cannot be compensated: {error}") from None
        moves.append(Move(direction.to(projection.weight.device), None))
        dampings.append(needed)
    return moves, dampings
