"""Forward and backward of an attention block with its norm, without autograd around the projections.

Kept for the backward pass: the block's input and its inverse RMS, and queries, keys and values. The attention output
is recomputed, which costs little next to the projections and saves a tensor of hidden size in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from gisp.model.attention import KV_INDEX
from gisp.model.structures import LayerMap
from gisp.score.fused.batch import PassBatch
from gisp.score.fused.products import Products
from gisp.score.fused.wanted import Wanted
from gisp_kernels import wgrad_importance
from gisp_kernels.ops import decoder
from gisp_kernels.ops.importance import StackedLinear, stacked_wgrad_importance


@dataclass
class AttentionState:
    """What one attention block keeps for its backward pass.

    Attributes:
        x: [T, D], input of the norm.
        rstd: float32 [T].
        qkv: [T, (H + 2 KV) * hd], rotated queries and keys beside the values; before norm and rotation where
            queries and keys are normalised.
    """

    x: torch.Tensor
    rstd: torch.Tensor
    qkv: torch.Tensor


class AttentionBlock:
    """The attention of one layer, at whatever width it has when called."""

    def __init__(self, item: LayerMap, products: Products) -> None:
        self._module: Any = item.attention
        self._norm: Any = item.layer.input_layernorm
        self._group = item.heads
        self._products = products
        self._head_dim = int(item.attention.head_dim)
        self._readers: list[Any] = [item.attention.q_proj, item.attention.k_proj, item.attention.v_proj]
        self._head_norms: list[Any] = [getattr(item.attention, name, None) for name in ("q_norm", "k_norm")]

    @property
    def empty(self) -> bool:
        """Whether no head is left."""
        return self._module.q_proj.weight.shape[0] == 0

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, batch: PassBatch
    ) -> tuple[AttentionState, torch.Tensor | None]:
        """The block's contribution to the residual stream ``x + delta``.

        Returns:
            The state (its ``x`` is the sum) and the output [T, D], ``None`` for nothing.
        """
        norm, module = self._norm, self._module
        x, normed, rstd = decoder.add_rms_norm(x, delta, norm.weight.detach(), norm.variance_epsilon, total=delta)
        if self.empty:
            bias = module.o_proj.bias
            output = None if bias is None else bias.detach().expand_as(x).contiguous()
            return AttentionState(x, rstd, normed.new_empty(x.shape[0], 0)), output
        qkv = self._products.forward(normed, self._readers)
        if self._head_norms[0] is None:
            for part in self._split(qkv)[:2]:
                decoder.rotary(self._by_head(part), batch.cos, batch.sin, out=self._by_head(part))
        state = AttentionState(x, rstd, qkv)
        query, key, value = self._expanded(*self._rotated(state, batch)[0])
        return state, self._products.forward(self._attend(query, key, value, batch), [module.o_proj])

    def backward(
        self,
        state: AttentionState,
        grad: torch.Tensor,
        batch: PassBatch,
        wanted: Wanted | None,
        input_grad: bool,
    ) -> None:
        """Backward of the block; ``grad`` [T, D] is dL/d(output) on entry and has dL/d(input) added on return.

        Args:
            wanted: where the block's scores go, ``None`` if it is not scored.
            input_grad: whether anything below needs ``grad``.
        """
        if self.empty or not (input_grad or wanted is not None):
            return
        scores = None if wanted is None else wanted.elements
        module = self._module
        blocks = {part.linear: part.block for part in self._group.projections}
        rotated, inverse_rms = self._rotated(state, batch)
        grad_attended = self._products.input_grad(grad, [module.o_proj])
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in self._expanded(*rotated)]
            attended = self._attend(leaves[0], leaves[1], leaves[2], batch)
        if wanted is not None and wanted.gates is not None:
            wanted.take_gates(attended.detach(), grad_attended, blocks[module.o_proj], batch)
            if not input_grad:
                return
        if scores is not None:
            o_proj = module.o_proj
            wgrad_importance(grad, attended.detach(), o_proj.weight, axis="column", block=blocks[o_proj], out=scores)
        grads = torch.autograd.grad(attended, leaves, grad_attended)
        del attended, leaves, grad_attended
        grad_qkv = self._unrotated(grads, state, inverse_rms, batch)
        del grads, rotated
        norm = self._norm
        if scores is not None:
            normed = decoder.rms_norm_apply(state.x, state.rstd, norm.weight.detach())
            layers, start = [], 0
            for linear in self._readers:
                if linear in blocks:
                    layers.append(StackedLinear(start, linear.weight, blocks[linear], scores))
                start += linear.weight.shape[0]
            stacked_wgrad_importance(grad_qkv, normed, layers)
            del normed
        if not input_grad:
            return
        grad_normed = self._products.input_grad(grad_qkv, self._readers)
        decoder.rms_norm_backward_(grad, grad_normed, state.x, state.rstd, norm.weight.detach())

    def _counts(self) -> tuple[int, int]:
        rows = self._module.q_proj.weight.shape[0], self._module.k_proj.weight.shape[0]
        return rows[0] // self._head_dim, rows[1] // self._head_dim

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads, kv_heads = self._counts()
        sizes = [heads * self._head_dim, kv_heads * self._head_dim, kv_heads * self._head_dim]
        query, key, value = qkv.split(sizes, dim=1)
        return query, key, value

    def _by_head(self, part: torch.Tensor) -> torch.Tensor:
        """[T, n * hd] as [T, n, hd]."""
        return part.unflatten(1, (-1, self._head_dim))

    def _rotated(self, state: AttentionState, batch: PassBatch) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Rotated queries and keys and the values, each [T, n, hd], and the inverse RMS of normalised heads."""
        parts = [self._by_head(part) for part in self._split(state.qkv)]
        if self._head_norms[0] is None:
            return parts, [None, None]
        inverse_rms: list[torch.Tensor | None] = []
        for i, norm in enumerate(self._head_norms):
            rows = parts[i].reshape(-1, self._head_dim)
            _, normed, rstd = decoder.add_rms_norm(rows, None, norm.weight.detach(), norm.variance_epsilon)
            heads = normed.view(parts[i].shape)
            parts[i] = decoder.rotary(heads, batch.cos, batch.sin, out=heads)
            inverse_rms.append(rstd)
        return parts, inverse_rms

    def _expanded(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """The same with one key and value per query head."""
        index = self._index(query, key)
        if index is None:
            return [query, key, value]
        return [query, decoder.expand_kv(key, index), decoder.expand_kv(value, index)]

    def _index(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """Which key/value head every query head uses, int64 [H]; ``None`` when each has its own."""
        heads, kv_heads = query.shape[1], key.shape[1]
        index: torch.Tensor | None = getattr(self._module, KV_INDEX, None)
        if index is None and heads != kv_heads:
            index = torch.arange(heads, device=query.device) // (heads // kv_heads)
        return index

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: PassBatch) -> torch.Tensor:
        """Causal attention over each sequence; [T, H, hd] each, returns [T, H * hd]."""
        q, k, v = (t.unflatten(0, (batch.rows, batch.length)).transpose(1, 2) for t in (query, key, value))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._module.scaling)
        return out.transpose(1, 2).reshape(batch.rows * batch.length, -1)

    def _unrotated(
        self,
        grads: tuple[torch.Tensor, ...],
        state: AttentionState,
        inverse_rms: list[torch.Tensor | None],
        batch: PassBatch,
    ) -> torch.Tensor:
        """Gradient of the three projections' outputs, side by side as in ``state.qkv``."""
        grad_qkv = torch.empty_like(state.qkv)
        targets = [self._by_head(part) for part in self._split(grad_qkv)]
        index = self._index(grads[0], targets[1])
        found = list(grads)
        if index is not None:
            kv_heads = targets[1].shape[1]
            found[1:] = [decoder.sum_kv(g, index, kv_heads) for g in grads[1:]]
        targets[2].copy_(found[2])
        raw = [self._by_head(part) for part in self._split(state.qkv)]
        for i, rstd in enumerate(inverse_rms):
            if rstd is None:
                decoder.rotary(found[i], batch.cos, batch.sin, inverse=True, out=targets[i])
                continue
            heads = decoder.rotary(found[i], batch.cos, batch.sin, inverse=True)
            rows = (heads.reshape(-1, self._head_dim), raw[i].reshape(-1, self._head_dim))
            weight = self._head_norms[i].weight.detach()
            targets[i].copy_(decoder.rms_norm_backward_(None, *rows, rstd, weight).view(targets[i].shape))
        return grad_qkv
