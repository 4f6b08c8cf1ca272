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
from dataclasses import replace

import torch

from gisp.model.structures import ModelMap
from gisp.offload.stream import resident_or_streamed
from gisp.score.fused.batch import MicroBatch, PassBatch, make_batch
from gisp.score.fused.block import Wanted
from gisp.score.fused.layers import Flow, Layers, embedded, lowest_scored
from gisp.score.fused.lm_head import LMHead
from gisp.score.fused.memory import Kept, what_layers_keep
from gisp.score.fused.products import Products
from gisp.score.fused.sums import parts_by_group, sample_sums
from gisp_kernels import backend


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
        self._visits = resident_or_streamed(model_map.model)
        self._layers = Layers(model_map.layers, products, self._visits)
        self._head = LMHead(model_map.model, Products())

    @torch.no_grad()
    def compile_ahead(self, ids: torch.Tensor) -> None:
        """Compile the Triton kernels of :meth:`gate_sums`, all at once, where they will run.

        Args:
            ids: int64 [B, S], a few tokens to go through the layers as they will.
        """
        weight = self._model.get_output_embeddings().weight
        if self._visits.recomputes or backend.interpreting() or backend.resolve(None, weight) != "triton":
            return
        from gisp_kernels.forms import compiled_ahead

        groups = [group for item in self._layers.items for group in (item.heads, item.channels) if group.count]
        with compiled_ahead(weight.device):
            self.gate_sums([MicroBatch(ids, ids, [1.0] * len(ids))], [(group.name, group.count) for group in groups])

    @torch.no_grad()
    def streams(self, ids: torch.Tensor, every: int = 8) -> dict[int, torch.Tensor]:
        """Residual streams [B * S, D] behind every so many layers and behind the last one, before the final norm.

        Args:
            ids: int64 [B, S].

        Returns:
            By the number of layers that a stream has passed.
        """
        found: dict[int, torch.Tensor] = {}
        # Batches are made of what lies in host memory.
        ids = ids.cpu()
        flow = embedded(self._model, make_batch(self._model.model, MicroBatch(ids, ids, [1.0] * len(ids))))

        def seen(number: int) -> None:
            if number and number % every == 0:
                found[number] = flow.stream()

        count = len(self._layers)
        with self._layers.visiting(count):
            self._layers.forward([flow], count, Kept(), seen)
        return {**found, count: flow.stream()}

    @torch.no_grad()
    def token_nll(self, micros: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Of every micro-batch the NLL of its scored tokens in their order, then of the followers, float32."""
        with self._layers.visiting(len(self._layers)):
            flows = self._forward_alone(micros)
            with self._layers.ending():
                return [self._head.token_nll(flow.x, flow.delta, flow.batch) for flow in flows]

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
        found = [
            parts_by_group(scored, torch.zeros(size, dtype=torch.float32, device=batch.ids.device)) for batch in batches
        ]
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
        wanted = [{name: Wanted(gates=part) for name, part in parts_by_group(scored, own).items()} for own in gates]
        losses = self._backward(batches, wanted)
        return [
            (parts_by_group(scored, sample_sums(own, batch, micro)), loss)
            for own, batch, micro, loss in zip(gates, batches, micros, losses, strict=True)
        ]

    def _backward(self, batches: list[PassBatch], wanted: list[dict[str, Wanted]]) -> list[torch.Tensor]:
        """Fill what is wanted of every group of every batch; their losses, 0-dim float64."""
        lowest = lowest_scored(self._layers.items, {name for of_batch in wanted for name in of_batch})
        with self._layers.visiting(lowest):
            flows = self._forward(batches, lowest)
            losses, grads = [], []
            with self._layers.ending():
                for flow in flows:
                    loss, grad = self._head.loss_and_grad(*flow.leave(), flow.batch)
                    losses.append(loss)
                    grads.append(grad)
            self._layers.backward(flows, grads, wanted, lowest)
        return losses

    def _forward_alone(self, micros: Sequence[MicroBatch]) -> list[Flow]:
        """A forward pass that no backward follows."""
        return self._forward([make_batch(self._model.model, micro) for micro in micros], len(self._layers))

    def _forward(self, batches: list[PassBatch], lowest: int) -> list[Flow]:
        """Residual streams and last outputs; layers from ``lowest`` keep what their backward needs."""
        flows = [embedded(self._model, batch) for batch in batches]
        kept = Kept(len(self._layers))
        if not self._visits.recomputes:
            tokens = batches[0].rows * batches[0].length
            kept = what_layers_keep([(1, self._layers.items[lowest:])], tokens, batches[0].ids.device)
        self._layers.forward(flows, lowest, kept)
        return flows
