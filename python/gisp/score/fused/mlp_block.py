"""Forward and backward of a gated MLP with its norm, without autograd.

Kept for the backward pass: the block's input with its inverse RMS, and the outputs of gate and up. The product
``silu(gate) * up`` is recomputed by the kernel that takes its gradient apart; the same read sums the gradients of gates
on channels.
"""

from __future__ import annotations

import torch

from gisp.model.structures import LayerMap
from gisp.score.fused.batch import PassBatch
from gisp.score.fused.block import Block, BlockState, Wanted
from gisp.score.fused.products import Products
from gisp_kernels.ops import decoder


class MLPBlock(Block):
    """The MLP of one layer; ``BlockState.read`` is [T, 2 I], gate beside up."""

    def __init__(self, item: LayerMap, products: Products) -> None:
        mlp = item.layer.mlp
        norm = item.layer.post_attention_layernorm
        super().__init__(item.channels, norm, [mlp.gate_proj, mlp.up_proj], mlp.down_proj, products)

    def _leaving(self, state: BlockState, batch: PassBatch) -> torch.Tensor:
        return decoder.swiglu(*_halves(state.read), backend=batch.backend)

    def backward(
        self, state: BlockState, grad: torch.Tensor, batch: PassBatch, wanted: Wanted | None, input_grad: bool
    ) -> None:
        """As :meth:`Block.backward`."""
        if self.empty or not (input_grad or wanted is not None):
            return
        gate, up = _halves(state.read)
        if wanted is not None and wanted.observe is not None:
            wanted.observe(decoder.swiglu(gate, up, backend=batch.backend), grad)
            if not input_grad:
                return
        activation = self._products.input_grad(grad, [self._leaver])
        elements = None if wanted is None else wanted.elements
        if wanted is not None and wanted.gates is not None:
            if not input_grad:
                self._take_gates(wanted.gates, decoder.swiglu(gate, up, backend=batch.backend), activation, batch)
                return
            scale = batch.gates.get(self._name)
            operands = gate, up, activation
            decoder.swiglu_backward_gates_(
                *operands, batch.length, scale=scale, out=wanted.gates, backend=batch.backend
            )
        else:
            activation = self._through_gates(activation, batch)
            # In place: dL/d(activation) becomes the activation, gate and up become their gradients.
            decoder.swiglu_backward_(gate, up, activation, backend=batch.backend)
            if elements is not None:
                self._score_leaver(elements, grad, activation)
        del activation
        self._to_input(state, grad, state.read, elements, input_grad, batch)


def _halves(read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, 2 I] as two [T, I]."""
    width = read.shape[1] // 2
    gate, up = read.split_with_sizes((width, width), 1)
    return gate, up
