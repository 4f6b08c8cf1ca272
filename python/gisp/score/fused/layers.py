"""Decoder layers of the fused pass: forward, what they keep in between, and backward.

Micro-batches that are given together go through each layer one after the other before the next layer's turn. Others may
set out before the first ones come back.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from gisp.model.structures import LayerMap
from gisp.offload.boundaries import Taken
from gisp.offload.stream import Resident, Visits
from gisp.score.fused.attention_block import AttentionBlock
from gisp.score.fused.batch import PassBatch
from gisp.score.fused.block import BlockState, Wanted
from gisp.score.fused.memory import Kept
from gisp.score.fused.mlp_block import MLPBlock
from gisp.score.fused.products import Products


def lowest_scored(items: Sequence[LayerMap], names: Container[str]) -> int:
    """Number of the lowest layer with a group of these names, that of all layers if there is none: no gradient is
    needed below it."""
    scored = (i for i, item in enumerate(items) if item.heads.name in names or item.channels.name in names)
    return min(scored, default=len(items))


@dataclass
class Flow:
    """One micro-batch on its way: the residual stream is ``x + delta``.

    Attributes:
        kept: of every layer that a backward goes through its state or what gives back its input, by layer.
    """

    batch: PassBatch
    x: torch.Tensor
    delta: torch.Tensor | None = None
    kept: list[_LayerState | Taken] = field(default_factory=list)

    def stream(self) -> torch.Tensor:
        """The residual stream [T, D] as it is now, in memory of its own."""
        return self.x.clone() if self.delta is None else self.x + self.delta

    def leave(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The two parts of the residual stream, held no longer: only a backward may follow."""
        parts = self.x, self.delta
        del self.x, self.delta
        return parts


class Layers:
    """Consecutive decoder layers, at whatever widths they have when called.

    Args:
        items: the layers, of the layout that :func:`gisp.score.fused.why_not` accepts.
        products: how activations and their gradients are multiplied with weights.
        visits: how the layers come to the device.
    """

    def __init__(self, items: Sequence[LayerMap], products: Products, visits: Visits | None = None) -> None:
        self.items = items
        self._layers = [_Layer(item, products) for item in items]
        self._visits = visits or Resident()

    def __len__(self) -> int:
        return len(self._layers)

    def visiting(self, lowest: int) -> AbstractContextManager[None]:
        """To be entered around a forward, the output projection and the backward down to layer ``lowest``."""
        return self._visits.visiting([*range(len(self) + 1), *reversed(range(lowest, len(self)))])

    def ending(self) -> AbstractContextManager[None]:
        """To be entered around the output projection."""
        return self._visits.visit(len(self))

    def forward(
        self, flows: Sequence[Flow], lowest: int, kept: Kept, seen: Callable[[int], None] = lambda number: None
    ) -> None:
        """Take every flow through all layers; those from ``lowest`` keep what their backward needs.

        Args:
            kept: how much of that.
            seen: is told the number of every layer before the flows enter it.
        """
        for i, layer in enumerate(self._layers):
            aside = partial(self._visits.keep, i) if i < lowest + kept.recomputed else None
            seen(i)
            with self._visits.visit(i):
                for flow in flows:
                    layer.take(flow, i >= lowest, aside, kept.attention)

    def backward(
        self,
        flows: Sequence[Flow],
        grads: Sequence[torch.Tensor],
        wanted: Sequence[Mapping[str, Wanted]],
        lowest: int,
        through: bool = False,
    ) -> None:
        """Fill what is wanted of every group by every flow, from the last layer down to ``lowest``.

        Args:
            grads: of every flow dL/d(output) [T, D], overwritten.
            wanted: by group name, of every flow.
            through: whether the gradients are to be dL/d(input) of layer ``lowest`` on return.
        """
        for i in reversed(range(lowest, len(self))):
            with self._visits.visit(i):
                for flow, grad, of_flow in zip(flows, grads, wanted, strict=True):
                    self._layers[i].backward(flow, grad, of_flow, through or i > lowest)


class _Layer:
    """One decoder layer: attention, then MLP, each adding to the residual stream."""

    def __init__(self, item: LayerMap, products: Products) -> None:
        self._heads, self._channels = item.heads.name, item.channels.name
        self._attention = AttentionBlock(item, products)
        self._mlp = MLPBlock(item, products)

    def take(
        self, flow: Flow, keeps: bool, aside: Callable[[torch.Tensor], Taken] | None, attention: bool = False
    ) -> None:
        """Forward of one flow.

        Args:
            keeps: whether its backward follows.
            aside: keeps the input in place of the state; ``None`` for the state.
            attention: whether the state holds the attention, too.
        """
        if keeps and aside is not None and flow.delta is not None:
            # A forward adds delta into its own memory; what is repeated later must start from the sum.
            flow.x, flow.delta = flow.delta.add_(flow.x), None
        start = flow.x
        state, flow.delta = self._forward(flow.x, flow.delta, flow.batch, attention and keeps and aside is None)
        flow.x = state.mlp.x
        if keeps:
            flow.kept.append(state if aside is None else aside(start))

    def backward(self, flow: Flow, grad: torch.Tensor, wanted: Mapping[str, Wanted], below: bool) -> None:
        """Backward of one flow, as of the blocks; ``below``: whether anything below needs ``grad``."""
        kept, batch = flow.kept.pop(), flow.batch
        state = kept if isinstance(kept, _LayerState) else self._forward(kept(), None, batch, True)[0]
        heads, channels = wanted.get(self._heads), wanted.get(self._channels)
        self._mlp.backward(state.mlp, grad, batch, channels, below or heads is not None)
        attention_state = state.attention
        # The MLP's tensors go before attention takes memory of its own.
        del kept, state
        self._attention.backward(attention_state, grad, batch, heads, below)

    def _forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, batch: PassBatch, attended: bool
    ) -> tuple[_LayerState, torch.Tensor | None]:
        attention, output = self._attention.forward(x, delta, batch)
        if not attended:
            attention.attended = None
        mlp, output = self._mlp.forward(attention.x, output, batch)
        return _LayerState(attention, mlp), output


@dataclass
class _LayerState:
    attention: BlockState
    mlp: BlockState


def embedded(model: Any, batch: PassBatch) -> Flow:
    """A micro-batch with its embeddings, [T, D]."""
    embedding: torch.Tensor = model.model.embed_tokens.weight
    return Flow(batch, embedding.detach().index_select(0, batch.ids))
