"""Weights of a model laid out anew: layers planned, their heads and channels taken or zeroed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gisp.export.folder import dense_state
from gisp.export.sizes.layout import ZEROED, AttentionLayout, plan_attention
from gisp.model.keep import Keep
from gisp.model.structures import ModelMap, structure_parameters


def plan_layers(model_map: ModelMap, keep: Keep, *, align: int = 1, minimum: int = 1) -> list[AttentionLayout]:
    """:func:`plan_attention` of every layer."""
    sizes = model_map.num_heads, model_map.num_kv_heads
    return [plan_attention(heads, *sizes, align=align, minimum=minimum) for heads in keep.heads]


def stored_state(
    base: Any, model_map: ModelMap, stored: Sequence[Mapping[str, Sequence[int]]]
) -> dict[str, torch.Tensor]:
    """Weights of a model by name that stores the given structures of every layer, in the dtype of the base.

    Args:
        stored: by layer and kind the original index in every slot, or ``ZEROED``.
    """
    state = dense_state(base)
    for layer, name, item in structure_parameters(len(stored)):
        if name in state:
            state[name] = take_blocks(state[name], stored[layer][item.kind], item.block(model_map.head_dim), item.dim)
    return state


def take_blocks(tensor: torch.Tensor, index: Sequence[int], block: int = 1, dim: int = 0) -> torch.Tensor:
    """Blocks of ``block`` rows (``dim`` 0) or columns (``dim`` 1) at the given block indices; zeros for ``ZEROED``."""
    positions = torch.tensor(index, dtype=torch.int64, device=tensor.device)
    blocks = tensor.unflatten(dim, (-1, block)).index_select(dim, positions.clamp(min=0))
    zeroed = torch.nonzero(positions == ZEROED).flatten()
    return blocks.index_fill_(dim, zeroed, 0).flatten(dim, dim + 1)
