"""When a compensation is kept: held-out text, the rule of paired differences, and the record.

A change is kept where it lowers a sum over held-out texts by more than the standard error of the fall. A text is a
document, a question or a sequence (:func:`gisp.data.held_out.hold_out`). They are paired: ``d_i`` is the sum of
text ``i`` after the change less that before it, ``n_i`` its tokens, ``N`` all tokens, ``U`` the number of texts. The
fall a token is ``-r`` with ``r = sum d_i / N``, its standard error that of a ratio (Cochran, Sampling Techniques,
1977)::

    error = sqrt(U / (U - 1) * sum (d_i - r n_i)^2) / N,    kept where r < -error

What is brought nearer to the dense model may still predict the text worse: pruned by the loss on some kind of text, a
model can have become better at it than the dense one would have it. So nothing counts that has a higher loss on the
held-out calibration text than the pruned model without any compensation, and nothing that raises the loss of a kind of
text by more than 0.5 % of perplexity. Kinds are those of the calibration text and those of the text that the run was
calibrated on, of which no method sees a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from gisp.compensation.streams import Batch
from gisp.data.held_out import LEAST
from gisp.replicas.sharing import sharers

# Nats a token by which the loss of a kind of text may rise: 0.5 % of perplexity.
_RISE = 0.005


@dataclass(frozen=True)
class Difference:
    """A change of a mean a token, and its standard error over texts."""

    mean: float
    error: float

    @property
    def falls(self) -> bool:
        """Whether the fall exceeds its standard error; what is not a number does not fall."""
        return self.mean < -self.error


def difference(before: torch.Tensor, after: torch.Tensor, tokens: torch.Tensor) -> Difference:
    """The paired difference of sums over texts, all float64 [U] with U of at least 2."""
    change = after - before
    mean = change.sum() / tokens.sum()
    spread = (change - mean * tokens).square().sum() * len(tokens) / (len(tokens) - 1)
    return Difference(float(mean), float(spread.sqrt() / tokens.sum()))


@dataclass(frozen=True)
class Texts:
    """Texts no method fits to.

    Attributes:
        batches: of its sequences.
        of_row: int64 [rows], number of the text every row belongs to.
        tokens: float64 [U], tokens of every text.
        scored: float64 [U], tokens of every text that are predicted and scored.
        targets: next tokens, int64 [T] by number of a batch that falls to this process, -100 where none is scored.
        kinds: name of the kind of every text; empty where all are of one.
    """

    batches: list[Batch]
    of_row: torch.Tensor
    tokens: torch.Tensor
    scored: torch.Tensor
    targets: dict[int, torch.Tensor]
    kinds: tuple[str, ...]

    def totals(self, values_of: Callable[[int], Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Sums over the tokens of every text, float64 [U] of every kind of value; processes share the batches.

        Args:
            values_of: values [T] of the real tokens of the batch of a number, of every kind.
        """

        def of_rows(number: int) -> list[list[float]]:
            return [self.batches[number].row_sums(values).tolist() for values in values_of(number)]

        found = sharers().each(range(len(self.batches)), of_rows)
        totals = [torch.zeros_like(self.tokens) for _ in found[0]]
        for batch, kinds in zip(self.batches, found, strict=True):
            texts = self.of_row[list(batch.rows)]
            for total, values in zip(totals, kinds, strict=True):
                total.index_add_(0, texts, torch.tensor(values, dtype=torch.float64))
        return totals


@dataclass(frozen=True)
class Limit:
    """How high the loss of some texts may be.

    Attributes:
        name: of them together, for people.
        numbers: theirs, int64 [n].
        scored: their scored tokens, float64 [n].
        before: losses of the pruned model without compensation, in nats summed over tokens, float64 [n].
        rise: nats a token by which these may rise; their sum may not at all where it is 0.
    """

    name: str
    numbers: torch.Tensor
    scored: torch.Tensor
    before: torch.Tensor
    rise: float

    def excess(self, losses: torch.Tensor) -> float:
        """Nats a token by which losses of all texts are above it, with their error where a rise is allowed."""
        now = losses[self.numbers]
        if not self.rise:
            return float((now.sum() - self.before.sum()) / self.scored.sum().clamp_min(1))
        found = difference(self.before, now, self.scored)
        return found.mean + found.error - self.rise


@dataclass(frozen=True)
class Measured:
    """What held-out text says of a pruned model.

    Attributes:
        divergences: from the dense model in nats, summed over the tokens of every text, float64 [U].
        excess: of every limit, nats a token by which the loss is above it.
    """

    divergences: torch.Tensor
    excess: tuple[float, ...]

    @property
    def total(self) -> float:
        """Sum of the divergences; infinite where the model does not count, as it breaks a limit or is not finite."""
        total = float(self.divergences.sum())
        return total if math.isfinite(total) and all(excess <= 0 for excess in self.excess) else math.inf

    def leaving(self, rooms: Sequence[float]) -> Measured:
        """The same, held against limits that are lower by so many nats a token."""
        return Measured(self.divergences, tuple(excess + room for excess, room in zip(self.excess, rooms, strict=True)))


@dataclass(frozen=True)
class HeldOut(Texts):
    """Calibration texts no method fits to, and what the loss of it and of other text may be.

    Attributes:
        dense: last states of the dense model, [T, D], by number of the batches that fall to this process.
        beside: held-out text of the run that the model was pruned in; its texts are numbered behind these.
        limits: none may be broken.
        refused: what broke one since :meth:`limited` was asked: names of the limits, and its divergence.
    """

    dense: dict[int, torch.Tensor]
    beside: Texts | None
    limits: tuple[Limit, ...] = ()
    refused: list[tuple[list[str], float]] = field(default_factory=list)

    def measured(self, divergences: torch.Tensor, losses: torch.Tensor) -> Measured:
        """Divergences [U] held against the limits; those that break one are noted.

        Args:
            losses: of all texts.
        """
        found = Measured(divergences, tuple(limit.excess(losses) for limit in self.limits))
        broken = [limit.name for limit, excess in zip(self.limits, found.excess, strict=True) if excess > 0]
        if broken:
            self.refused.append((broken, float(divergences.sum())))
        return found

    def limited(self, reached: float) -> tuple[str, ...]:
        """Names of the limits that kept a divergence below ``reached`` from counting since they were last asked for.

        Of several such divergences the one nearest to what was reached tells.
        """
        lower = [(divergence, names) for names, divergence in self.refused if divergence < reached]
        self.refused.clear()
        return tuple(max(lower, key=lambda one: one[0])[1]) if lower else ()

    def mean(self, found: Measured) -> float:
        """Divergence in nats a token."""
        return float(found.divergences.sum() / self.tokens.sum())

    def difference(self, before: Measured, after: Measured) -> Difference:
        """Of the divergence in nats a token."""
        return difference(before.divergences, after.divergences, self.tokens)


def make_limits(own: Texts, beside: Texts | None, losses: torch.Tensor) -> tuple[Limit, ...]:
    """What the losses of held-out text may be: its sum no more than now, that of each kind little more.

    Kinds of fewer than 4 texts have no limit of their own, nor has the only kind of a text.

    Args:
        losses: of the pruned model without compensation, float64 [U] of ``own`` and behind them of ``beside``.
    """
    count = len(own.tokens)
    limits = [Limit("the calibration text", torch.arange(count), own.scored, losses[:count], 0.0)]
    found = _by_kind(own, 0, "the calibration text")
    if beside is not None:
        found += [
            ("the run's own text", list(range(count, len(losses)))),
            *_by_kind(beside, count, "the run's own text"),
        ]
    scored = torch.cat([text.scored for text in (own, beside) if text is not None])
    for name, numbers in found:
        if float(scored[numbers].sum()):
            limits.append(Limit(name, torch.tensor(numbers), scored[numbers], losses[numbers], _RISE))
    return tuple(limits)


def _by_kind(held: Texts, first: int, name: str) -> list[tuple[str, list[int]]]:
    """Name and numbers of the texts of every kind that is held out by enough, where there are several."""
    parts = {kind: [first + n for n, own in enumerate(held.kinds) if own == kind] for kind in held.kinds}
    if len(parts) < 2:
        return []
    return [(f"kind {kind} of {name}", numbers) for kind, numbers in parts.items() if len(numbers) >= LEAST]


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
        size: of fits and training: the factor on all accepted moves.
        blocks: of fits, all pruned blocks.
        steps: of ``kfac``.
        count: of training: steps behind which the divergence was lowest, or whose moves ``size`` is a factor on.
        limited: names of the text whose loss kept a lower divergence from counting.
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
    limited: tuple[str, ...] = ()

    @property
    def after(self) -> float:
        """Divergence the method leaves behind."""
        return self.reached if self.kept else self.before

    @classmethod
    def ended(
        cls, name: str, tokens: int, held_out: HeldOut, before: Measured, after: Measured, **more: object
    ) -> MethodResult:
        """A method that found ``before`` and reached ``after``."""
        found = held_out.difference(before, after)
        limited = held_out.limited(after.total)
        return cls(
            name,
            tokens,
            held_out.mean(before),
            held_out.mean(after),
            found.error,
            found.falls,
            limited=limited,
            **more,  # type: ignore[arg-type]
        )
