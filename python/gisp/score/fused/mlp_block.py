"""Forward and backward of a gated MLP with its norm, without autograd.

Kept for the backward pass: the block's input with its inverse RMS, and the outputs of gate and up. The product
``silu(gate) * up`` is recomputed by the kernel that takes its gradient apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gisp.model.structures import LayerMap
from gisp.score.fused.batch import PassBatch
from gisp.score.fused.products import Products
from gisp.score.fused.wanted import Wanted
from gisp_kernels import wgrad_importance
from gisp_kernels.ops import decoder
from gisp_kernels.ops.importance import StackedLinear, stacked_wgrad_importance


@dataclass
class MLPState:
    """What one MLP keeps for its backward pass.

    Attributes:
        x: [T, D], input of the norm.
        rstd: float32 [T].
        gate_up: [T, 2 I], outputs of both projections side by side.
    """

    x: torch.Tensor
    rstd: torch.Tensor
    gate_up: torch.Tensor


class MLPBlock:
    """The MLP of one layer, at whatever width it has when called."""

    def __init__(self, item: LayerMap, products: Products) -> None:
        self._module: Any = item.layer.mlp
        self._norm: Any = item.layer.post_attention_layernorm
        self._products = products

    @property
    def empty(self) -> bool:
        """Whether no channel is left."""
        return self._module.gate_proj.weight.shape[0] == 0

    def forward(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[MLPState, torch.Tensor | None]:
        """The block's contribution to the residual stream ``x + delta``.

        Returns:
            The state (its ``x`` is the sum) and the output [T, D], ``None`` for nothing.
        """
        norm, module = self._norm, self._module
        x, normed, rstd = decoder.add_rms_norm(x, delta, norm.weight.detach(), norm.variance_epsilon, total=delta)
        if self.empty:
            bias = module.down_proj.bias
            output = None if bias is None else bias.detach().expand_as(x).contiguous()
            return MLPState(x, rstd, normed.new_empty(x.shape[0], 0)), output
        gate_up = self._products.forward(normed, (module.gate_proj, module.up_proj))
        activation = decoder.swiglu(*gate_up.split(module.gate_proj.weight.shape[0], dim=1))
        return MLPState(x, rstd, gate_up), self._products.forward(activation, [module.down_proj])

    def backward(
        self, state: MLPState, grad: torch.Tensor, batch: PassBatch, wanted: Wanted | None, input_grad: bool
    ) -> None:
        """Backward of the block; ``grad`` [T, D] is dL/d(output) on entry and has dL/d(input) added on return.

        The state is used up.

        Args:
            wanted: where the block's scores go, ``None`` if it is not scored.
            input_grad: whether anything below needs ``grad``.
        """
        if self.empty or not (input_grad or wanted is not None):
            return
        scores = None if wanted is None else wanted.elements
        module, norm = self._module, self._norm
        layers = (module.gate_proj, module.up_proj)
        width = module.gate_proj.weight.shape[0]
        gate, up = state.gate_up.split(width, dim=1)
        activation = self._products.input_grad(grad, [module.down_proj])
        if wanted is not None and wanted.gates is not None:
            wanted.take_gates(decoder.swiglu(gate, up), activation, 1, batch)
            if not input_grad:
                return
        # In place: dL/d(activation) becomes the activation, gate and up become their gradients.
        decoder.swiglu_backward_(gate, up, activation)
        if scores is not None:
            wgrad_importance(grad, activation, module.down_proj.weight, axis="column", out=scores)
        del activation
        if scores is not None:
            normed = decoder.rms_norm_apply(state.x, state.rstd, norm.weight.detach())
            stack = [StackedLinear(i * width, linear.weight, 1, scores) for i, linear in enumerate(layers)]
            stacked_wgrad_importance(state.gate_up, normed, stack)
            del normed
        if not input_grad:
            return
        grad_normed = self._products.input_grad(state.gate_up, layers)
        decoder.rms_norm_backward_(grad, grad_normed, state.x, state.rstd, norm.weight.detach())
