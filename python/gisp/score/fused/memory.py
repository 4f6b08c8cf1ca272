"""What layers keep between forward and backward: the attention too where the GPU holds it, their input alone where it
cannot hold more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gisp.model.structures import LayerMap
from gisp.score.fused.products import parameter, stacks

# Share of the free memory that kept tensors may take; the rest is for fragments and what other code allocates.
USABLE = 0.92


class LayerBytes(NamedTuple):
    """Memory of a layer in a pass over so many tokens.

    Attributes:
        start: of its input.
        kept: between its forward and its backward: two residual streams, q, k, v, gate and up, and stacked weights.
        attention: kept more with its attention: the output and float32 sums, keys and values of every query head where
            they share them, queries and keys where these are normalised.
        working: of the busiest moment of its backward beside what layers keep: the MLP's activation and stacked weight
            gradient beside attention that was just recomputed, or attention's expanded heads and their gradients,
            beside two tensors of hidden size.
    """

    start: int
    kept: int
    attention: int
    working: int

    @classmethod
    def of(cls, item: LayerMap, tokens: int) -> LayerBytes:
        """At the widths it has now."""
        # A pass asks for all layers, and nn.Module takes the host long to find what it holds.
        parts = item.attention._modules
        query, key = parameter(parts["q_proj"], "weight"), parameter(parts["k_proj"], "weight")
        gate = parameter(item.layer._modules["mlp"]._modules["gate_proj"], "weight")
        (width, hidden), columns, size = gate.shape, query.shape[0], gate.element_size()
        read = columns + 2 * key.shape[0], 2 * width
        stacked = sum(rows * hidden for rows in read if stacks(gate, rows))
        copies = 1 + 2 * (key.shape[0] != columns) + 2 * (parts.get("q_norm") is not None)
        attention = tokens * columns * (copies * size + 4 / int(item.attention.head_dim))
        working = max(tokens * (width + 3 * columns) + 2 * width * hidden, 8 * tokens * columns) + 3 * tokens * hidden
        kept = tokens * (2 * hidden + sum(read)) + stacked
        return cls(tokens * hidden * size, kept * size, int(attention), working * size)


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
    if device.type != "cuda" or not any(layers for _, layers in held):
        return Kept(attention=True)
    needed = [(batches, [LayerBytes.of(item, tokens) for item in layers]) for batches, layers in held]
    every = [layer for _, layers in needed for layer in layers]
    budget = _usable_bytes(device) - max(layer.working for layer in every)
    kept = [(batches, [layer.kept for layer in layers]) for batches, layers in needed]
    recomputed = recomputed_within(budget, kept, every[0].start)
    total = sum(batches * sum(layer.kept + layer.attention for layer in layers) for batches, layers in needed)
    return Kept(recomputed, total <= budget)


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
    # Every other way to ask torch sorts all its statistics.
    found = torch.cuda.memory_stats_as_nested_dict(device)
    unused: int = found["reserved_bytes"]["all"]["current"] - found["allocated_bytes"]["all"]["current"]
    return USABLE * (free + unused)
