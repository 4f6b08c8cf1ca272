"""Which structures a step removes: normalisation, one global ranking, and the two removal rules.

Structures are numbered once for the whole model: heads in layer order, then channels in layer order. Ties go to the
lowest number. All arithmetic is float64 on the host, so that the choice depends on the fp32 scores alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from gisp.schedule import threshold_rank
from gisp.structures import ModelMap, channels_name, heads_name


@dataclass(frozen=True)
class Block:
    """One group's stretch of the global numbering."""

    name: str
    start: int
    stop: int
    cost: int
    divisor: float
    minimum: int
    multiple: int
    protected: bool


@dataclass(frozen=True)
class Choice:
    """What a step removes.

    Attributes:
        removed: group name -> original indices, ascending.
        parameters: decoder parameters these structures hold.
        threshold: highest normalised score among them, None when nothing goes.
    """

    removed: dict[str, np.ndarray]
    parameters: int
    threshold: float | None


class Selector:
    """Global ranking over the structures of one model.

    Args:
        model_map: the dense model's map.
        norm: ``params`` (parameters of the scored structure, paper Eq. 9), ``official`` (what the released code
            divides by: 4*head_dim*hidden and 3*intermediate_size) or ``none``.
        protected: layers never pruned.
        align: kept MLP widths are multiples of this.
        keep_minimum: keep at least one head and ``align`` channels per layer.
    """

    def __init__(
        self, model_map: ModelMap, *, norm: str, protected: frozenset[int], align: int, keep_minimum: bool
    ) -> None:
        head_norm, channel_norm = _divisors(model_map, norm)
        heads, width = model_map.num_heads, model_map.intermediate_size
        kinds = (
            (heads_name, heads, model_map.head_parameters, head_norm, int(keep_minimum), 1),
            (channels_name, width, model_map.channel_parameters, channel_norm, align * keep_minimum, align),
        )
        self.blocks: list[Block] = []
        start = 0
        for name_of, count, cost, divisor, minimum, multiple in kinds:
            for layer in range(len(model_map.layers)):
                self.blocks.append(
                    Block(
                        name_of(layer),
                        start,
                        start + count,
                        cost,
                        divisor,
                        min(minimum, count),
                        multiple,
                        layer in protected,
                    )
                )
                start += count
        self.size = start
        self._block_cost = np.array([b.cost for b in self.blocks])
        self._multiple = np.array([b.multiple for b in self.blocks])
        # Fewest structures each block can be left with: its minimum rounded up to its multiple.
        self._floor = np.array([min(-(-b.minimum // b.multiple) * b.multiple, b.stop - b.start) for b in self.blocks])
        self.removed = np.zeros(start, dtype=bool)
        self.protected = np.zeros(start, dtype=bool)
        self._cost = np.zeros(start, dtype=np.int64)
        self._block_of = np.zeros(start, dtype=np.int64)
        for i, block in enumerate(self.blocks):
            span = slice(block.start, block.stop)
            self.protected[span] = block.protected
            self._cost[span] = block.cost
            self._block_of[span] = i

    @property
    def removed_parameters(self) -> int:
        """Decoder parameters removed so far."""
        return int(self._cost[self.removed].sum())

    @property
    def removable_parameters(self) -> int:
        """The most that can ever be removed, protection and minima respected."""
        return sum(
            block.cost * (block.stop - block.start - int(floor))
            for block, floor in zip(self.blocks, self._floor, strict=True)
            if not block.protected
        )

    def normalise(self, scores: Mapping[str, torch.Tensor]) -> np.ndarray:
        """Float64 scores of all structures in the global numbering; removed and protected ones are +inf.

        Args:
            scores: group name -> scores [original count]; groups of protected layers may be absent.
        """
        result = np.full(self.size, np.inf)
        for block in self.blocks:
            if block.name in scores:
                values = scores[block.name].detach().cpu().double().numpy()
                result[block.start : block.stop] = values / block.divisor
        result[self.removed | self.protected] = np.inf
        return result

    def within_target(self, normalised: np.ndarray, target: float) -> Choice:
        """Lowest scores first while all removed parameters stay at or below ``target``.

        With alignment the longest run of the ranking counts whose aligned removal fits.
        """
        order = self._ranking(normalised)
        block_of = self._block_of[order]
        live = self._live()

        def cost(count: int) -> int:
            wanted = np.bincount(block_of[:count], minlength=len(self.blocks))
            return int((self._allowed(wanted, live) * self._block_cost).sum())

        # Equality of target and sum is exact in the reals; floats may miss it by rounding.
        budget = target * (1 + 1e-12) - self.removed_parameters
        high = 256
        while high < len(order) and cost(high) <= budget:
            high *= 2
        low, high = 0, min(high, len(order))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
        return self._choose(normalised, self._aligned(order[:low]))

    def below_threshold(self, normalised: np.ndarray, ratio: float) -> Choice:
        """Every live structure at or below the k-th smallest score, removed ones counting as the lowest.

        Protected ones count as +inf and stay in the number of structures, as in the released code.
        """
        counted = normalised.copy()
        counted[self.removed] = -np.inf
        rank = threshold_rank(self.size, ratio)
        threshold = np.partition(counted, rank - 1)[rank - 1]
        order = self._ranking(normalised)
        return self._choose(normalised, self._aligned(order[normalised[order] <= threshold]))

    def apply(self, choice: Choice) -> None:
        """Count a choice as removed."""
        for block in self.blocks:
            index = choice.removed.get(block.name)
            if index is not None:
                self.removed[block.start + index] = True

    def out_of_reach(self, ratio: float) -> int:
        """How many protected structures a ratio would have to take (0 = none)."""
        return max(0, threshold_rank(self.size, ratio) - int((~self.protected).sum()))

    def _live(self) -> np.ndarray:
        """Kept structures per block."""
        return np.array([int((~self.removed[b.start : b.stop]).sum()) for b in self.blocks])

    def _allowed(self, wanted: np.ndarray, live: np.ndarray) -> np.ndarray:
        """How many of ``wanted`` removals per block its width multiple and its minimum let through."""
        kept = -(-(live - wanted) // self._multiple) * self._multiple
        return live - np.minimum(np.maximum(kept, self._floor), live)

    def _ranking(self, normalised: np.ndarray) -> np.ndarray:
        order = np.argsort(normalised, kind="stable")
        return order[: int((~(self.removed | self.protected)).sum())]

    def _aligned(self, candidates: np.ndarray) -> np.ndarray:
        """Candidates (lowest score first) less each block's best few that its width multiple or minimum defers."""
        block_of = self._block_of[candidates]
        wanted = np.bincount(block_of, minlength=len(self.blocks))
        allowed = self._allowed(wanted, self._live())
        # Position of each candidate within its own block, in rank order.
        by_block = np.argsort(block_of, kind="stable")
        first = np.concatenate(([0], np.cumsum(wanted)[:-1]))
        position = np.empty_like(candidates)
        position[by_block] = np.arange(len(candidates)) - first[block_of[by_block]]
        return candidates[position < allowed[block_of]]

    def _choose(self, normalised: np.ndarray, chosen: np.ndarray) -> Choice:
        removed: dict[str, np.ndarray] = {}
        block_of = self._block_of[chosen]
        for i in np.unique(block_of):
            block = self.blocks[i]
            removed[block.name] = np.sort(chosen[block_of == i]) - block.start
        threshold = float(normalised[chosen].max()) if len(chosen) else None
        return Choice(removed, int(self._cost[chosen].sum()), threshold)


def _divisors(model_map: ModelMap, norm: str) -> tuple[float, float]:
    if norm == "params":
        return float(model_map.head_parameters), float(model_map.channel_parameters)
    if norm == "official":
        head = 4 * model_map.head_dim * model_map.hidden_size
        return float(head), float(3 * model_map.intermediate_size)
    return 1.0, 1.0
