"""Weights of a model laid out anew: layers planned, their heads and channels taken or zeroed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from gisp.export.folder import dense_state
from gisp.export.sizes.layout import ZEROED, AttentionLayout, plan_attention
from gisp.mapped import give_back
from gisp.model.keep import Keep
from gisp.model.structures import ModelMap, structure_parameters

Cut = tuple[Sequence[int], int, int]


def plan_layers(model_map: ModelMap, keep: Keep, *, align: int = 1, minimum: int = 1) -> list[AttentionLayout]:
    """:func:`plan_attention` of every layer."""
    sizes = model_map.num_heads, model_map.num_kv_heads
    return [plan_attention(heads, *sizes, align=align, minimum=minimum) for heads in keep.heads]


class LaidOut(Mapping[str, torch.Tensor]):
    """Weights by name, in the dtype of the base and on its device; what is cut is made when it is asked for.

    None is held, so that an export needs no memory for the whole of what it writes.

    Args:
        dense: weights of the base by name.
        cuts: by name of a weight the original index in every slot, the rows or columns of one, and the dimension.

    Attributes:
        shapes: of all weights, as tensors on ``meta``.
    """

    def __init__(self, dense: Mapping[str, torch.Tensor], cuts: Mapping[str, Cut]) -> None:
        self._dense, self._cuts = dense, cuts
        self.shapes = {name: self._shape(name) for name in dense}

    def __getitem__(self, name: str) -> torch.Tensor:
        cut, dense = self._cuts.get(name), self._dense[name]
        if cut is None:
            return dense
        taken = take_blocks(dense, *cut)
        give_back(dense)
        return taken

    def __iter__(self) -> Iterator[str]:
        return iter(self._dense)

    def __len__(self) -> int:
        return len(self._dense)

    def without(self, module: str) -> LaidOut:
        """All but the weights of a module."""
        left = {name: tensor for name, tensor in self._dense.items() if not name.startswith(f"{module}.")}
        return LaidOut(left, self._cuts)

    def _shape(self, name: str) -> torch.Tensor:
        tensor = self._dense[name]
        shape = list(tensor.shape)
        if name in self._cuts:
            index, block, dim = self._cuts[name]
            shape[dim] = len(index) * block
        return torch.empty(shape, dtype=tensor.dtype, device="meta")


def stored_state(base: Any, model_map: ModelMap, stored: Sequence[Mapping[str, Sequence[int]]]) -> LaidOut:
    """Weights of a model by name that stores the given structures of every layer, in the dtype of the base.

    Args:
        stored: by layer and kind the original index in every slot, or ``ZEROED``.
    """
    dense = dense_state(base)
    cuts = {
        name: (stored[layer][item.kind], item.block(model_map.head_dim), item.dim)
        for layer, name, item in structure_parameters(len(stored))
        if name in dense
    }
    return LaidOut(dense, cuts)


def take_blocks(tensor: torch.Tensor, index: Sequence[int], block: int = 1, dim: int = 0) -> torch.Tensor:
    """Blocks of ``block`` rows (``dim`` 0) or columns (``dim`` 1) of [O, I] or [O] at block indices; zeros for
    ``ZEROED``."""
    positions = torch.tensor(index, dtype=torch.int64, device=tensor.device)
    blocks = tensor.unflatten(dim, (-1, block)).index_select(dim, positions.clamp(min=0))
    zeroed = torch.nonzero(positions == ZEROED).flatten()
    return blocks.index_fill_(dim, zeroed, 0).flatten(dim, dim + 1)
