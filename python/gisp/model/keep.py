"""A pruned point: which query heads and channels every layer of a model keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from gisp.model.structures import ModelMap, channels_name, heads_name

Removal = Mapping[str, torch.Tensor]
"""Group name -> original indices (int64) of the heads or channels a step removes; absent = none."""


@dataclass(frozen=True, repr=False)
class Keep:
    """What stays of every layer.

    Attributes:
        heads, channels: original indices of a layer's query heads and MLP channels, ascending; any may be empty.
    """

    heads: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...]

    def __repr__(self) -> str:
        heads, channels = (sum(map(len, layers)) for layers in (self.heads, self.channels))
        return f"<Keep: {heads:,} heads and {channels:,} channels of {len(self.heads)} layers>"

    @classmethod
    def of(cls, kept: Mapping[str, torch.Tensor]) -> Keep:
        """From indices by group name, in any order."""
        layers = range(len(kept) // 2)
        heads, channels = (
            tuple(tuple(sorted(kept[name(layer)].tolist())) for layer in layers) for name in (heads_name, channels_name)
        )
        return cls(heads, channels)

    @property
    def layers(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Heads and channels, layer by layer."""
        return zip(self.heads, self.channels, strict=True)

    def columns(self, layer: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept input columns of a layer's o_proj and down_proj, int64."""
        return (
            block_columns(torch.tensor(self.heads[layer], dtype=torch.int64), head_dim),
            torch.tensor(self.channels[layer], dtype=torch.int64),
        )

    def removed(self, model_map: ModelMap) -> dict[str, torch.Tensor]:
        """Everything that does not stay, by group."""
        gone: dict[str, torch.Tensor] = {}
        for layer, (heads, channels) in enumerate(self.layers):
            for name, kept, count in (
                (heads_name(layer), heads, model_map.num_heads),
                (channels_name(layer), channels, model_map.intermediate_size),
            ):
                index = missing(kept, count)
                if index:
                    gone[name] = torch.tensor(index)
        return gone


def missing(kept: Iterable[int], count: int) -> list[int]:
    """What is not kept of ``count``, ascending."""
    return sorted(set(range(count)).difference(kept))


def kv_heads(heads: Sequence[int], share: int) -> list[int]:
    """Key/value heads that given query heads read, ``share`` of these each; ascending if they are."""
    return list(dict.fromkeys(head // share for head in heads))


def block_columns(index: torch.Tensor, block: int) -> torch.Tensor:
    """Rows or columns of blocks of ``block``, int64 [n] to [n * block], in the given order."""
    return (index[:, None] * block + torch.arange(block, device=index.device)).flatten()
