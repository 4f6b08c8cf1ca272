"""Consecutive decoder layers of the fused pass alone: forward, what they keep in between, and backward.

They may be passed by several batches before the first of them comes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gisp.model.structures import LayerMap
from gisp.score.fused.batch import PassBatch
from gisp.score.fused.block import Wanted
from gisp.score.fused.importance_pass import _Layer, _LayerState
from gisp.score.fused.products import Products

# By layer its state or, to save memory, only what its forward starts from.
States = list[_LayerState | tuple[torch.Tensor, torch.Tensor | None]]


def embedded(model: Any, batch: PassBatch) -> torch.Tensor:
    """Embeddings of a batch, [T, D]."""
    embedding: torch.Tensor = model.model.embed_tokens.weight
    return embedding.detach().index_select(0, batch.ids)


class Layers:
    """Consecutive decoder layers, at whatever widths they have when called.

    Args:
        items: the layers, of the layout that :func:`gisp.score.fused.why_not` accepts.
        products: how activations and their gradients are multiplied with weights.
    """

    def __init__(self, items: Sequence[LayerMap], products: Products) -> None:
        self.items = items
        self._layers = [_Layer(item, products) for item in items]

    def __len__(self) -> int:
        return len(self._layers)

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, batch: PassBatch, lowest: int, recomputed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None, States]:
        """Residual stream and last output from ``x + delta``, and the states of the layers from ``lowest``.

        Args:
            recomputed: how many of these keep only what their forward starts from.
        """
        states: States = []
        stop = lowest + recomputed
        for i, layer in enumerate(self._layers):
            if lowest <= i < stop and delta is not None:
                # A forward adds delta into its own memory; what is repeated later must start from the sum.
                x, delta = delta.add_(x), None
            start = x
            state, delta = layer.forward(x, delta, batch)
            x = state.mlp.x
            if i >= lowest:
                states.append((start, None) if i < stop else state)
        return x, delta, states

    def backward(
        self, states: States, grad: torch.Tensor, batch: PassBatch, wanted: Mapping[str, Wanted], through: bool
    ) -> None:
        """Fill what is wanted of every group; ``grad`` [T, D] is dL/d(output) and is overwritten.

        Args:
            states: of the last layers; used up.
            through: whether ``grad`` is to be dL/d(input) on return, all layers having a state.
        """
        lowest = len(self._layers) - len(states)
        for i in reversed(range(lowest, len(self._layers))):
            layer, kept = self._layers[i], states.pop()
            state = kept if isinstance(kept, _LayerState) else layer.forward(*kept, batch)[0]
            heads, channels = wanted.get(layer.item.heads.name), wanted.get(layer.item.channels.name)
            below = through or i > lowest
            layer.mlp.backward(state.mlp, grad, batch, channels, below or heads is not None)
            attention_state = state.attention
            # The MLP's tensors go before attention takes memory of its own.
            del kept, state
            layer.attention.backward(attention_state, grad, batch, heads, below)
            del attention_state
