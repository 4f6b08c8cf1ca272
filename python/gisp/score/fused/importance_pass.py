"""The fused pass: scores of one batch by a forward and a backward pass of our own, layer by layer.

What this saves against autograd over the model: no weight gradient is formed that is not scored, none is kept; layers
below the first scored one keep nothing and get no gradient; elementwise parts are fused and gradients overwrite what
they are no longer needed with. Tensors that a layer keeps are listed in its blocks. But for `token_nll`
nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gisp.model.structures import LayerMap, ModelMap
from gisp.score.fused.attention_block import AttentionBlock
from gisp.score.fused.batch import MicroBatch, PassBatch, make_batch
from gisp.score.fused.block import BlockState, Wanted
from gisp.score.fused.lm_head import LMHead
from gisp.score.fused.memory import layers_to_recompute
from gisp.score.fused.mlp_block import MLPBlock
from gisp.score.fused.products import Products
from gisp_kernels import gate_sums


class _Layer:
    """One decoder layer: attention, then MLP, each adding to the residual stream."""

    def __init__(self, item: LayerMap, products: Products) -> None:
        self.item = item
        self.attention = AttentionBlock(item, products)
        self.mlp = MLPBlock(item, products)
        self.groups = {item.heads.name, item.channels.name}

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, batch: PassBatch
    ) -> tuple[_LayerState, torch.Tensor | None]:
        attention, output = self.attention.forward(x, delta, batch)
        mlp, output = self.mlp.forward(attention.x, output, batch)
        return _LayerState(attention, mlp), output


@dataclass
class _LayerState:
    attention: BlockState
    mlp: BlockState


class ImportancePass:
    """Scores structures of one model, at whatever widths it has when called.

    The model must be of the layout that :func:`gisp.score.fused.why_not` accepts.

    Args:
        products: how the decoder layers' activations and their gradients are multiplied with weights, by default in the
            weights' dtype. The output projection and the weight gradients always are.
    """

    def __init__(self, model_map: ModelMap, products: Products | None = None) -> None:
        products = products or Products()
        self._model = model_map.model
        self._layers = [_Layer(item, products) for item in model_map.layers]
        self._head = LMHead(model_map.model, Products())

    @torch.no_grad()
    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """Residual stream after the last layer, before the final norm; int64 [B, S] to [B * S, D]."""
        batch = make_batch(self._model.model, MicroBatch(ids, ids, [1.0] * len(ids)))
        x, delta, _ = self._forward(batch, len(self._layers))
        return x if delta is None else x + delta

    @torch.no_grad()
    def token_nll(self, micro: MicroBatch) -> torch.Tensor:
        """NLL of the scored tokens of a micro-batch in their order, then of the followers, float32 on the device."""
        batch = make_batch(self._model.model, micro)
        x, delta, _ = self._forward(batch, len(self._layers))
        return self._head.token_nll(x, delta, batch)

    @torch.no_grad()
    def score(
        self, micro: MicroBatch, scored: Sequence[tuple[str, int]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Scores of a micro-batch: ``sum |W * dL/dW|`` per structure (GISP Eq. 8 with it as the set).

        Args:
            scored: name and present count of every group to score.

        Returns:
            Group name -> float32 [count] on the device (views of one buffer), and the loss, 0-dim float64.
        """
        batch = make_batch(self._model.model, micro)
        buffer = torch.zeros(sum(count for _, count in scored), dtype=torch.float32, device=batch.ids.device)
        parts = _parts(scored, buffer)
        loss = self._backward(batch, {name: Wanted(elements=part) for name, part in parts.items()})
        return parts, loss

    @torch.no_grad()
    def gate_sums(
        self,
        micro: MicroBatch,
        scored: Sequence[tuple[str, int]],
        gates_at: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What second-order scores are made of; no weight gradient is formed.

        Args:
            scored: as for :meth:`score`.
            gates_at: group name -> [columns], where gates do not stand at 1.

        Returns:
            Group name -> float64 [3, count] on the device, see :func:`gisp_kernels.gate_sums`, and the loss.
        """
        batch = replace(make_batch(self._model.model, micro), gates=gates_at or {})
        gates = torch.zeros(batch.rows, sum(count for _, count in scored), dtype=torch.float32, device=batch.ids.device)
        parts = _parts(scored, gates)
        loss = self._backward(batch, {name: Wanted(gates=part) for name, part in parts.items()})
        if micro.samples is None:
            return _parts(scored, gate_sums(gates, batch.curvature)), loss
        return _parts(scored, gate_sums(gates, micro.samples.curvature.to(gates.device), micro.samples.index)), loss

    def _backward(self, batch: PassBatch, wanted: dict[str, Wanted]) -> torch.Tensor:
        """Fill what is wanted of every group; the loss, 0-dim float64."""
        # Positions of the layers, not their names: below the lowest scored one no gradient is needed.
        scored = (i for i, layer in enumerate(self._layers) if layer.groups & wanted.keys())
        lowest = min(scored, default=len(self._layers))
        x, delta, states = self._forward(batch, lowest)
        loss, grad = self._head.loss_and_grad(x, delta, batch)
        del x, delta
        for i in reversed(range(lowest, len(self._layers))):
            layer, kept = self._layers[i], states.pop()
            state = kept if isinstance(kept, _LayerState) else layer.forward(*kept, batch)[0]
            heads, channels = wanted.get(layer.item.heads.name), wanted.get(layer.item.channels.name)
            below = i > lowest
            layer.mlp.backward(state.mlp, grad, batch, channels, below or heads is not None)
            attention_state = state.attention
            # The MLP's tensors go before attention takes memory of its own.
            del kept, state
            layer.attention.backward(attention_state, grad, batch, heads, below)
            del attention_state
        return loss

    def _forward(
        self, batch: PassBatch, lowest: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[_LayerState | tuple[torch.Tensor, torch.Tensor | None]]]:
        """Residual stream and last output, and for every layer from ``lowest`` its state or, to save memory, only what
        its forward starts from."""
        states: list[_LayerState | tuple[torch.Tensor, torch.Tensor | None]] = []
        recomputed = lowest + layers_to_recompute([layer.item for layer in self._layers[lowest:]], batch)
        x, delta = self._embed(batch), None
        for i, layer in enumerate(self._layers):
            if lowest <= i < recomputed and delta is not None:
                # A forward adds delta into its own memory; what is repeated later must start from the sum.
                x, delta = delta.add_(x), None
            start = x
            state, delta = layer.forward(x, delta, batch)
            x = state.mlp.x
            if i >= lowest:
                states.append((start, None) if i < recomputed else state)
        return x, delta, states

    def _embed(self, batch: PassBatch) -> torch.Tensor:
        embedding: Any = self._model.model.embed_tokens
        return embedding.weight.detach().index_select(0, batch.ids)


def _parts(scored: Sequence[tuple[str, int]], buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views by group of a buffer [..., structures]."""
    if not scored:
        return {}
    sizes = [count for _, count in scored]
    return dict(zip((name for name, _ in scored), buffer.split(sizes, dim=-1), strict=True))
