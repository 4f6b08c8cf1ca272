"""What layers keep between forward and backward: the attention too where the GPU holds it, their input alone where it
cannot hold more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gisp.model.structures import LayerMap

# Share of the free memory that kept tensors may take; the rest is for fragments and what other code allocates.
USABLE = 0.92


def kept_bytes(item: LayerMap, tokens: int) -> int:
    """Bytes a layer keeps between its forward and its backward: two residual streams, q, k, v, gate and up."""
    attention, mlp = item.attention, item.layer.mlp
    weight = mlp.gate_proj.weight
    columns = 2 * attention.q_proj.weight.shape[1] + 2 * weight.shape[0]
    columns += attention.q_proj.weight.shape[0] + 2 * attention.k_proj.weight.shape[0]
    return tokens * columns * weight.element_size()


def attention_bytes(item: LayerMap, tokens: int) -> int:
    """Bytes a layer keeps more with its attention: the output and float32 sums, keys and values of every query head
    where they share them, queries and keys where these are normalised."""
    attention = item.attention
    weight, size = attention.q_proj.weight, int(attention.head_dim)
    copies = 1 + 2 * (attention.k_proj.weight.shape[0] != weight.shape[0])
    copies += 2 * (getattr(attention, "q_norm", None) is not None)
    return tokens * weight.shape[0] * (copies * weight.element_size() * size + 4) // size


def working_bytes(item: LayerMap, tokens: int) -> int:
    """Bytes the busiest moment of a layer's backward takes beside what layers keep: the MLP's activation and stacked
    weight gradient beside attention that was just recomputed, or attention's expanded heads and their gradients, beside
    two tensors of hidden size."""
    attention, mlp = item.attention, item.layer.mlp
    weight = mlp.gate_proj.weight
    width, hidden = weight.shape
    columns = attention.q_proj.weight.shape[0]
    in_mlp = tokens * (width + 3 * columns) + 2 * width * hidden
    in_attention = 8 * tokens * columns
    return (max(in_mlp, in_attention) + 3 * tokens * hidden) * weight.element_size()


class Kept(NamedTuple):
    """What layers keep between forward and backward. It never changes a score: the same kernels on the same operands
    give the same bits.

    Attributes:
        recomputed: how many of the first layers of every chunk run their forward again in the backward pass instead of
            keeping its tensors.
        attention: whether the others keep attention too, instead of running it again.
    """

    recomputed: int = 0
    attention: bool = False


def what_layers_keep(held: Sequence[tuple[int, Sequence[LayerMap]]], tokens: int, device: torch.device) -> Kept:
    """As much as fits.

    Args:
        held: of every chunk how many batches it holds at a time, and its layers that keep anything.
        tokens: of the largest batch.
    """
    items = [item for _, layers in held for item in layers]
    if device.type != "cuda" or not items:
        return Kept(attention=True)
    budget = _usable_bytes(device) - max(working_bytes(item, tokens) for item in items)
    bytes_kept = [(batches, [kept_bytes(item, tokens) for item in layers]) for batches, layers in held]
    recomputed = recomputed_within(budget, bytes_kept, _start_bytes(items[0], tokens))
    with_attention = sum(
        batches * (sum(kept) + sum(attention_bytes(item, tokens) for item in layers))
        for (batches, kept), (_, layers) in zip(bytes_kept, held, strict=True)
    )
    return Kept(recomputed, with_attention <= budget)


def recomputed_within(budget: float, held: Sequence[tuple[int, Sequence[int]]], start: int) -> int:
    """The fewest first layers of every chunk to recompute so that what is kept fits in ``budget`` bytes.

    Args:
        held: of every chunk how many batches it holds, and bytes that every layer keeps of one.
        start: bytes a recomputed layer keeps.
    """
    # The layer being recomputed holds its tensors again; by then those above it are gone.
    most = max(len(kept) for _, kept in held)
    for count in range(most):
        total = sum(batches * (start * min(count, len(kept)) + sum(kept[count:])) for batches, kept in held)
        if total <= budget:
            return count
    return most


def _usable_bytes(device: torch.device) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return USABLE * (free + unused)


def _start_bytes(item: LayerMap, tokens: int) -> int:
    weight = item.layer.mlp.gate_proj.weight
    return tokens * weight.shape[1] * weight.element_size()
