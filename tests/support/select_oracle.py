"""The removal rules in numpy on the host: a bisection over the ranking, in the numbering of all structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gisp.select.schedule import threshold_rank


@dataclass(frozen=True)
class OracleBlock:
    """``count`` consecutive structures."""

    count: int
    cost: int
    divisor: float
    minimum: int
    multiple: int
    protected: bool


class OracleSelector:
    """Global ranking; scores are one array, blocks lie one after another."""

    def __init__(self, blocks: Sequence[OracleBlock]) -> None:
        counts = [b.count for b in blocks]
        self.start = np.concatenate(([0], np.cumsum(counts)))
        self.size = int(self.start[-1])
        self._block_of = np.repeat(np.arange(len(blocks)), counts)
        self._block_cost = np.array([b.cost for b in blocks])
        self._divisor = np.repeat([b.divisor for b in blocks], counts)
        self._multiple = np.array([b.multiple for b in blocks])
        self._floor = np.array([min(-(-b.minimum // b.multiple) * b.multiple, b.count) for b in blocks])
        self.protected = np.repeat([b.protected for b in blocks], counts)
        self.removed = np.zeros(self.size, dtype=bool)

    @property
    def removed_parameters(self) -> int:
        return int(self._block_cost[self._block_of[self.removed]].sum())

    def normalise(self, scores: np.ndarray) -> np.ndarray:
        normalised = scores.astype(np.float64) / self._divisor
        normalised[self.removed | self.protected] = np.inf
        return normalised

    def within_target(self, normalised: np.ndarray, target: float) -> np.ndarray:
        """Numbers that go, ascending."""
        order = self._ranking(normalised)
        block_of = self._block_of[order]
        live = self._live()

        def cost(count: int) -> int:
            wanted = np.bincount(block_of[:count], minlength=len(self._block_cost))
            return int((self._allowed(wanted, live) * self._block_cost).sum())

        budget = target * (1 + 1e-12) - self.removed_parameters
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
        return self._aligned(order[:low])

    def below_threshold(self, normalised: np.ndarray, ratio: float) -> np.ndarray:
        """Numbers that go, ascending."""
        counted = normalised.copy()
        counted[self.removed] = -np.inf
        rank = threshold_rank(self.size, ratio)
        threshold = np.partition(counted, rank - 1)[rank - 1]
        order = self._ranking(normalised)
        return self._aligned(order[normalised[order] <= threshold])

    def _live(self) -> np.ndarray:
        return np.bincount(self._block_of[~self.removed], minlength=len(self._block_cost))

    def _allowed(self, wanted: np.ndarray, live: np.ndarray) -> np.ndarray:
        kept = -(-(live - wanted) // self._multiple) * self._multiple
        return live - np.minimum(np.maximum(kept, self._floor), live)

    def _ranking(self, normalised: np.ndarray) -> np.ndarray:
        order = np.argsort(normalised, kind="stable")
        return order[: int((~(self.removed | self.protected)).sum())]

    def _aligned(self, candidates: np.ndarray) -> np.ndarray:
        block_of = self._block_of[candidates]
        wanted = np.bincount(block_of, minlength=len(self._block_cost))
        allowed = self._allowed(wanted, self._live())
        kept: list[int] = []
        taken = np.zeros_like(wanted)
        for number, block in zip(candidates.tolist(), block_of.tolist(), strict=True):
            if taken[block] < allowed[block]:
                kept.append(number)
            taken[block] += 1
        return np.sort(np.array(kept, dtype=np.int64))


def score_histogram(normalised: np.ndarray, boundary: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts [2, bins + 1] of log10 of scores below and from ``boundary``; the last: those not above 0."""
    with np.errstate(divide="ignore"):
        logs = np.log10(normalised.clip(0))
    live = np.isfinite(logs)
    off = np.array([[(normalised[:boundary] <= 0).sum()], [(normalised[boundary:] <= 0).sum()]])
    if not live.any():
        return np.zeros(bins + 1), np.concatenate([np.zeros((2, bins), dtype=np.int64), off], axis=1)
    low, high = float(logs[live].min()), float(logs[live].max())
    edges = np.linspace(low, high if high > low else low + 1e-6, bins + 1)
    parts = (logs[:boundary], logs[boundary:])
    found = np.stack([np.histogram(part[np.isfinite(part)], edges)[0] for part in parts])
    return edges, np.concatenate([found, off], axis=1)
