"""Lines of a layer's weight that go together, whose they are, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gisp_kernels.layers import Sizes


@dataclass(frozen=True, eq=False)
class Claim:
    """Lines of an axis that belong to the structures of a group.

    Attributes:
        group: number of the group.
        block: consecutive lines of a structure.
        index: int64 CPU [structures, lines] where the lines of a structure lie apart; ``None``: structure ``s`` owns
            ``s*block : (s+1)*block``, and together they own every line.
    """

    group: int
    block: int
    index: torch.Tensor | None


class Axis:
    """Lines along one dimension of the tensors they lie in: a weight and its bias, say.

    Attributes:
        place: the layer and the lines, for messages.
        claims: whose the lines are.
        total: lines in memory.
        extent: lines shown; in memory they come first.
    """

    def __init__(self, total: int, place: str) -> None:
        self.place = place
        self.claims: list[Claim] = []
        self.total = self.extent = total
        self._lines = total
        self._followers: list[tuple[Any, Sizes]] = []
        self._at: torch.Tensor | None = None

    @property
    def swapped(self) -> bool:
        """Whether structures are blocks that trade places; otherwise all lines are laid out anew."""
        return self._at is None

    def add(self, claim: Claim) -> None:
        """Give lines to the structures of one more group; to give the same again changes nothing.

        Raises:
            ValueError: they are another structure's already.
        """
        if any(_same(claim, other) for other in self.claims):
            return
        index = claim.index
        if index is not None and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self._lines:
            raise ValueError(
                f"{self.place}: there are {self._lines}, got index {int(index.min())} to {int(index.max())}"
            )
        self.claims.append(claim)
        indices = [other.index for other in self.claims if other.index is not None]
        if not indices:
            if len(self.claims) > 1:
                raise ValueError(f"two groups cut {self.place}: give each of them the index of its own lines")
            return
        lines = torch.cat([index.flatten() for index in indices])
        if len(indices) < len(self.claims) or len(lines.unique()) < len(lines):
            raise ValueError(f"{self.place}: one line is given to two structures")
        self._at = torch.arange(self._lines)

    def follow(self, layer: Any, sizes: Sizes) -> None:
        """Keep attributes of a layer equal to what they are at the lines shown."""
        self._followers.append((layer, sizes))

    def set_kept(self, kept: Sequence[int]) -> None:
        """Take over how many structures every group keeps."""
        extent = self._lines
        for claim in self.claims:
            count, index = kept[claim.group], claim.index
            extent = count * claim.block if index is None else extent - index[count:].numel()
        self.extent = extent
        for layer, sizes in self._followers:
            for name, value in sizes.items():
                # nn.Module's own attribute setting looks for parameters and modules first, at ten times the cost.
                object.__setattr__(layer, name, value(extent))

    def lay_out(self, order: Callable[[int], torch.Tensor], kept: Sequence[int]) -> torch.Tensor:
        """The place in memory each line comes from, int64 CPU [total], so that what is kept comes first.

        The structure at a position takes that position's lines; lines of no structure stay. What is kept comes in
        the order of the lines.

        Args:
            order: gives for a group the structure at each position, int64 CPU.
            kept: structures kept in every group.
        """
        assert self._at is not None
        at, shown = torch.arange(self._lines), self._shown(kept)
        for claim in self.claims:
            assert claim.index is not None
            at[claim.index] = claim.index[order(claim.group)]
        places = torch.full((self._lines,), -1)
        places[self._at] = torch.arange(self.total)
        wanted = torch.cat([at[shown], at[~shown]])
        self._at = wanted[places[wanted] >= 0]
        return places[self._at]

    def shown_at(self, kept: Sequence[int]) -> torch.Tensor:
        """Where every line that is kept is shown, int64 CPU [lines]; other places hold nothing of use."""
        return self._shown(kept).cumsum(0) - 1

    def _shown(self, kept: Sequence[int]) -> torch.Tensor:
        shown = torch.ones(self._lines, dtype=torch.bool)
        for claim in self.claims:
            assert claim.index is not None
            shown[claim.index[kept[claim.group] :]] = False
        return shown

    def pack(self) -> None:
        """Lines that are not shown are no longer in memory."""
        self.total = self.extent
        if self._at is not None:
            self._at = self._at[: self.extent]


def _same(one: Claim, other: Claim) -> bool:
    if one.index is None or other.index is None:
        return one.index is other.index and (one.group, one.block) == (other.group, other.block)
    return one.group == other.group and torch.equal(one.index, other.index)
