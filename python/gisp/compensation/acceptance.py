"""When a compensation is kept: held-out text, the rule of paired differences, the search for a size, and the record.

A change is kept where it lowers a sum over held-out units by more than the standard error of the fall. A unit is a
document, a question or a sequence (:func:`gisp.data.held_out.hold_out`). They are paired: ``d_i`` is the sum of
unit ``i`` after the change less that before it, ``n_i`` its tokens, ``N`` all tokens, ``U`` the number of units. The
fall a token is ``-r`` with ``r = sum d_i / N``, its standard error that of a ratio (Cochran, Sampling Techniques,
1977)::

    error = sqrt(U / (U - 1) * sum (d_i - r n_i)^2) / N,    kept where r < -error

What is brought nearer to the dense model may still predict the text worse: pruned by the loss on some kind of text, a
model can have become better at it than the dense one would have it. So nothing counts that has a higher loss on the
held-out text than the pruned model without any compensation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gisp.compensation.streams import Batch
from gisp.replicas.sharing import sharers

# A size shrinks until it helps, then grows or shrinks while that helps more: a size a little too large loses all.
_GROWTH, _SHRINKING, _TRIALS = 1.5, 0.5, 12


@dataclass(frozen=True)
class HeldOut:
    """Calibration text no method fits to.

    Attributes:
        batches: of its sequences.
        units: int64 [rows], number of the unit every row belongs to.
        tokens: float64 [U], tokens of every unit.
        dense: last states of the dense model, [T, D], by number of the batches that fall to this process.
        targets: next tokens, int64 [T] by number of such a batch, -100 where none is scored.
        most: loss of all tokens, in nats, above which nothing counts.
    """

    batches: list[Batch]
    units: torch.Tensor
    tokens: torch.Tensor
    dense: dict[int, torch.Tensor]
    targets: dict[int, torch.Tensor]
    most: float = math.inf

    def totals(self, values_of: Callable[[int], Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Sums over the tokens of every unit, float64 [U] of every kind of value; processes share the batches.

        Args:
            values_of: values [T] of the real tokens of the batch of a number, of every kind.
        """

        def of_rows(number: int) -> list[list[float]]:
            return [self.batches[number].row_sums(values).tolist() for values in values_of(number)]

        found = sharers().each(range(len(self.batches)), of_rows)
        totals = [torch.zeros_like(self.tokens) for _ in found[0]]
        for batch, kinds in zip(self.batches, found, strict=True):
            units = self.units[list(batch.rows)]
            for total, values in zip(totals, kinds, strict=True):
                total.index_add_(0, units, torch.tensor(values, dtype=torch.float64))
        return totals

    def counts(self, losses: torch.Tensor) -> bool:
        """Whether losses [U] are not above what counts."""
        return not float(losses.sum()) > self.most

    def mean(self, totals: torch.Tensor) -> float:
        """A token's share of totals [U]."""
        return float(totals.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Difference:
    """A change of a mean a token, and its standard error over units."""

    mean: float
    error: float

    @property
    def falls(self) -> bool:
        """Whether the fall exceeds its standard error; what is not a number does not fall."""
        return self.mean < -self.error


def difference(before: torch.Tensor, after: torch.Tensor, tokens: torch.Tensor) -> Difference:
    """The paired difference of sums over units, all float64 [U] with U of at least 2."""
    change = after - before
    mean = change.sum() / tokens.sum()
    spread = (change - mean * tokens).square().sum() * len(tokens) / (len(tokens) - 1)
    return Difference(float(mean), float(spread.sqrt() / tokens.sum()))


def search(
    value: Callable[[float], torch.Tensor], first: float, before: torch.Tensor, most: float = math.inf
) -> tuple[float, torch.Tensor]:
    """A size with a lower sum than ``before`` has, and its values [U]; (0, ``before``) where none is found.

    Args:
        value: sums over units [U] with a size.
        first: the size tried first.
        most: the largest size.
    """
    size, best = first, value(first)
    trials = 1
    # A value that is not a number is not below either.
    while not float(best.sum()) < float(before.sum()):
        if trials == _TRIALS:
            return 0.0, before
        size *= _SHRINKING
        best = value(size)
        trials += 1
    start = size
    for factor in (_GROWTH, 1 / _GROWTH):
        while trials < _TRIALS and size * factor <= most:
            found = value(size * factor)
            trials += 1
            if not float(found.sum()) < float(best.sum()):
                break
            size, best = size * factor, found
        if size != start:
            break
    return size, best


@dataclass(frozen=True)
class BlockFit:
    """How a fit did in one block.

    Attributes:
        name: of the block's group, ``layers.{i}.heads`` or ``layers.{i}.channels``.
        before, after: what the block's output lacked to its target over the tokens of the fit, as a fraction of the
            target's sum of squares, without and with the fit.
        damping: what the solver needed.
        accepted: whether the sum of squares fell on held-out tokens too; otherwise the block keeps what it had.
    """

    name: str
    before: float
    after: float
    damping: float
    accepted: bool


@dataclass(frozen=True)
class Step:
    """One step of ``kfac``.

    Attributes:
        size: the factor ``s``, 0 where no size lowered the divergence.
        tokens: calibration tokens its direction was taken from.
        before, after: divergence from the dense model in nats a token, on held-out text.
        damping: the largest that a block's solver needed.
        raised: number of blocks that needed more damping than was asked for.
    """

    size: float
    tokens: int
    before: float
    after: float
    damping: float
    raised: int


@dataclass(frozen=True)
class MethodResult:
    """What one method of a compensation did.

    Attributes:
        name: of its method.
        tokens: calibration tokens it saw, one seen twice counts twice.
        before: divergence from the dense model in nats a token on held-out text, as the method found it.
        reached: the lowest divergence it reached without a higher loss; ``kept`` says whether that is a fall.
        error: standard error of the difference.
        kept: whether its result stays.
        size: of fits: the factor on all accepted moves.
        blocks: of fits, all pruned blocks.
        steps: of ``kfac``.
        count: of training: steps behind which the divergence was lowest.
    """

    name: str
    tokens: int
    before: float
    reached: float
    error: float
    kept: bool
    size: float = 0.0
    blocks: tuple[BlockFit, ...] = ()
    steps: tuple[Step, ...] = ()
    count: int = 0

    @property
    def after(self) -> float:
        """Divergence the method leaves behind."""
        return self.reached if self.kept else self.before

    @classmethod
    def ended(
        cls, name: str, tokens: int, held_out: HeldOut, before: torch.Tensor, after: torch.Tensor, **more: object
    ) -> MethodResult:
        """A method that found ``before`` and reached ``after``, divergences [U] summed over units."""
        found = difference(before, after, held_out.tokens)
        return cls(name, tokens, held_out.mean(before), held_out.mean(after), found.error, found.falls, **more)  # type: ignore[arg-type]
