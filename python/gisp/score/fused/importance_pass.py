"""The fused pass: scores of one batch by a forward and a backward pass of our own, layer by layer.

What this saves against autograd over the model: no weight gradient is formed that is not scored, none is kept; layers
below the first scored one keep nothing and get no gradient; elementwise parts are fused and gradients overwrite what
they are no longer needed with. Tensors that a layer keeps are listed in its blocks. But for `token_nll`
nothing here waits for the GPU.

Several micro-batches go through each layer one after the other before the next layer's turn. Where layers lie in host
memory (:mod:`gisp.offload`) a step so fetches each of them twice, and every layer keeps its input alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gisp.model.structures import LayerMap, ModelMap
from gisp.offload.boundaries import Taken
from gisp.offload.stream import resident_or_streamed
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


@dataclass
class _Flow:
    """One micro-batch on its way: the residual stream is ``x + delta``.

    Attributes:
        kept: of every layer from the lowest scored one its state or what gives back its input, by layer.
    """

    batch: PassBatch
    x: torch.Tensor
    delta: torch.Tensor | None = None
    kept: list[_LayerState | Taken] = field(default_factory=list)


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
        self._visits = resident_or_streamed(model_map.model)

    @torch.no_grad()
    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """Residual stream after the last layer, before the final norm; int64 [B, S] to [B * S, D]."""
        (flow,) = self._forward_alone([MicroBatch(ids, ids, [1.0] * len(ids))])
        return flow.x if flow.delta is None else flow.x + flow.delta

    @torch.no_grad()
    def token_nll(self, micros: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Of every micro-batch the NLL of its scored tokens in their order, then of the followers, float32."""
        return [self._head.token_nll(flow.x, flow.delta, flow.batch) for flow in self._forward_alone(micros)]

    @torch.no_grad()
    def score(
        self, micros: Sequence[MicroBatch], scored: Sequence[tuple[str, int]]
    ) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Scores of every micro-batch: ``sum |W * dL/dW|`` per structure (GISP Eq. 8 with it as the set).

        Args:
            scored: name and present count of every group to score.

        Returns:
            Of each: group name -> float32 [count] on the device (views of one buffer), and the loss, 0-dim float64.
        """
        batches = [make_batch(self._model.model, micro) for micro in micros]
        size = sum(count for _, count in scored)
        found = [_parts(scored, torch.zeros(size, dtype=torch.float32, device=batch.ids.device)) for batch in batches]
        wanted = [{name: Wanted(elements=part) for name, part in parts.items()} for parts in found]
        return list(zip(found, self._backward(batches, wanted), strict=True))

    @torch.no_grad()
    def gate_sums(
        self,
        micros: Sequence[MicroBatch],
        scored: Sequence[tuple[str, int]],
        gates_at: Mapping[str, torch.Tensor] | None = None,
    ) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """What second-order scores are made of; no weight gradient is formed.

        Args:
            scored: as for :meth:`score`.
            gates_at: group name -> [columns], where gates do not stand at 1.

        Returns:
            Of each micro-batch: group name -> float64 [3, count] on the device, see :func:`gisp_kernels.gate_sums`, and
            the loss.
        """
        batches = [replace(make_batch(self._model.model, micro), gates=gates_at or {}) for micro in micros]
        size = sum(count for _, count in scored)
        gates = [torch.zeros(b.rows, size, dtype=torch.float32, device=b.ids.device) for b in batches]
        wanted = [{name: Wanted(gates=part) for name, part in _parts(scored, own).items()} for own in gates]
        losses = self._backward(batches, wanted)
        return [
            (_parts(scored, _sums(own, batch, micro)), loss)
            for own, batch, micro, loss in zip(gates, batches, micros, losses, strict=True)
        ]

    def _backward(self, batches: list[PassBatch], wanted: list[dict[str, Wanted]]) -> list[torch.Tensor]:
        """Fill what is wanted of every group of every batch; their losses, 0-dim float64."""
        # Positions of the layers, not their names: below the lowest scored one no gradient is needed.
        names = {name for of_batch in wanted for name in of_batch}
        lowest = min((i for i, layer in enumerate(self._layers) if layer.groups & names), default=len(self._layers))
        down = [*reversed(range(lowest, len(self._layers)))]
        with self._visits.visiting([*range(len(self._layers)), *down]):
            flows = self._forward(batches, lowest)
            losses, grads = [], []
            for flow in flows:
                loss, grad = self._head.loss_and_grad(flow.x, flow.delta, flow.batch)
                del flow.x, flow.delta
                losses.append(loss)
                grads.append(grad)
            for i in down:
                with self._visits.visit(i):
                    for flow, grad, of_batch in zip(flows, grads, wanted, strict=True):
                        self._layer_backward(self._layers[i], flow, grad, of_batch, i > lowest)
        return losses

    def _layer_backward(
        self, layer: _Layer, flow: _Flow, grad: torch.Tensor, wanted: dict[str, Wanted], below: bool
    ) -> None:
        """Backward of one layer, as of its blocks; ``below``: whether a lower layer is scored."""
        kept, batch = flow.kept.pop(), flow.batch
        state = kept if isinstance(kept, _LayerState) else layer.forward(kept(), None, batch)[0]
        heads, channels = wanted.get(layer.item.heads.name), wanted.get(layer.item.channels.name)
        layer.mlp.backward(state.mlp, grad, batch, channels, below or heads is not None)
        attention_state = state.attention
        # The MLP's tensors go before attention takes memory of its own.
        del kept, state
        layer.attention.backward(attention_state, grad, batch, heads, below)

    def _forward_alone(self, micros: Sequence[MicroBatch]) -> list[_Flow]:
        """A forward pass that no backward follows."""
        layers = range(len(self._layers))
        with self._visits.visiting(layers):
            return self._forward([make_batch(self._model.model, micro) for micro in micros], len(layers))

    def _forward(self, batches: list[PassBatch], lowest: int) -> list[_Flow]:
        """Residual streams and last outputs, and of layers from ``lowest`` their states or, to save memory, what gives
        back their inputs."""
        flows = [_Flow(batch, self._embed(batch)) for batch in batches]
        recomputed = len(self._layers)
        if not self._visits.recomputes:
            recomputed = lowest + layers_to_recompute([layer.item for layer in self._layers[lowest:]], batches[0])
        for i, layer in enumerate(self._layers):
            with self._visits.visit(i):
                for flow in flows:
                    if lowest <= i < recomputed and flow.delta is not None:
                        # A forward adds delta into its own memory; what is repeated later must start from the sum.
                        flow.x, flow.delta = flow.delta.add_(flow.x), None
                    start = flow.x
                    state, flow.delta = layer.forward(flow.x, flow.delta, flow.batch)
                    flow.x = state.mlp.x
                    if i >= lowest:
                        flow.kept.append(self._visits.keep(i, start) if i < recomputed else state)
        return flows

    def _embed(self, batch: PassBatch) -> torch.Tensor:
        embedding: Any = self._model.model.embed_tokens
        return embedding.weight.detach().index_select(0, batch.ids)


def _sums(gates: torch.Tensor, batch: PassBatch, micro: MicroBatch) -> torch.Tensor:
    """Sums over the samples of a micro-batch, float64 [3, structures], of gate gradients [rows, structures]."""
    if micro.samples is None:
        return gate_sums(gates, batch.curvature)
    return gate_sums(gates, micro.samples.curvature.to(gates.device), micro.samples.index)


def _parts(scored: Sequence[tuple[str, int]], buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views by group of a buffer [..., structures]."""
    if not scored:
        return {}
    sizes = [count for _, count in scored]
    return dict(zip((name for name, _ in scored), buffer.split(sizes, dim=-1), strict=True))
