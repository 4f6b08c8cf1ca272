"""Forward and backward of an attention block with its norm, without autograd around the projections.

Kept for the backward pass: the block's input and its inverse RMS, and queries, keys and values. The attention output
is recomputed, which costs little next to the projections and saves a tensor of hidden size in every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gisp.model.attention import KV_INDEX
from gisp.model.structures import LayerMap
from gisp.score.fused.batch import PassBatch
from gisp.score.fused.block import Block, BlockState, Wanted
from gisp.score.fused.products import Products
from gisp_kernels.ops import decoder


class AttentionBlock(Block):
    """The attention of one layer.

    ``BlockState.read`` is [T, (H + 2 KV) * hd], rotated queries and keys beside the values; before norm and rotation
    where queries and keys are normalised.
    """

    def __init__(self, item: LayerMap, products: Products) -> None:
        module: Any = item.attention
        readers = [module.q_proj, module.k_proj, module.v_proj]
        super().__init__(item.heads, item.layer.input_layernorm, readers, module.o_proj, products)
        self._module = module
        self._head_dim = int(module.head_dim)
        self._head_norms: list[Any] = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        # The module's own index, numbers of heads and device, and what :meth:`_index` makes of them.
        self._known: tuple[torch.Tensor | None, tuple[int, int, torch.device], torch.Tensor, torch.Tensor] | None = None

    def _leaving(self, state: BlockState, batch: PassBatch) -> torch.Tensor:
        if self._head_norms[0] is None:
            heads, kv_heads = self._counts()
            turned = self._by_head(state.read)[:, : heads + kv_heads]
            decoder.rotary(turned, batch.cos, batch.sin, out=turned)
        return self._attend(self._expanded(state, self._rotated(state, batch)[0]), batch)[0]

    def backward(
        self, state: BlockState, grad: torch.Tensor, batch: PassBatch, wanted: Wanted | None, input_grad: bool
    ) -> None:
        """As :meth:`Block.backward`."""
        if self.empty or not (input_grad or wanted is not None):
            return
        rotated, inverse_rms = self._rotated(state, batch)
        grad_attended = self._products.input_grad(grad, [self._leaver])
        attended, before = self._attend(self._expanded(state, rotated), batch)
        if wanted is not None and wanted.observe is not None:
            wanted.observe(attended, grad)
            if not input_grad:
                return
        if wanted is not None and wanted.gates is not None:
            self._take_gates(wanted.gates, attended, grad_attended, batch)
            if not input_grad:
                return
        elements = None if wanted is None else wanted.elements
        if elements is not None:
            self._score_leaver(elements, grad, attended)
        grads = before(self._through_gates(grad_attended, batch))
        del attended, before, grad_attended
        grad_qkv = self._unrotated(grads, state, inverse_rms, batch)
        del grads, rotated
        self._to_input(state, grad, grad_qkv, elements, input_grad)

    def _counts(self) -> tuple[int, int]:
        rows = self._readers[0].weight.shape[0], self._readers[1].weight.shape[0]
        return rows[0] // self._head_dim, rows[1] // self._head_dim

    def _by_head(self, columns: torch.Tensor) -> torch.Tensor:
        """[T, n * hd] as [T, n, hd]."""
        return columns.view(len(columns), -1, self._head_dim)

    def _parts(self, read: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values, [T, n, hd] each, of what lies as in ``BlockState.read``."""
        heads, kv_heads = self._counts()
        return list(self._by_head(read).split((heads, kv_heads, kv_heads), dim=1))

    def _rotated(self, state: BlockState, batch: PassBatch) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Rotated queries and keys and the values, each [T, n, hd], and the inverse RMS of normalised heads."""
        parts = self._parts(state.read)
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

    def _expanded(self, state: BlockState, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Rotated queries, keys and values, of the state where it holds them, with a key and value per query head."""
        query, key, value = parts
        heads, kv_heads = query.shape[1], key.shape[1]
        index, of_both = self._index(heads, kv_heads, query.device)
        if index is None or of_both is None:
            return parts
        if self._head_norms[0] is not None:
            return [query, decoder.expand_kv(key, index), decoder.expand_kv(value, index)]
        # Keys and values lie side by side and are one launch.
        return [query, *decoder.expand_kv(self._by_head(state.read)[:, heads:], of_both).split(heads, dim=1)]

    def _index(
        self, heads: int, kv_heads: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which key/value head every query head uses, int64 [H], and which keys and then values, int64 [2 H], of heads
        beside one another; ``None`` where each has its own."""
        own: torch.Tensor | None = getattr(self._module, KV_INDEX, None)
        if own is None and heads == kv_heads:
            return None, None
        # A step asks three times a layer, and widths change between steps at most.
        if self._known is None or self._known[0] is not own or self._known[1] != (heads, kv_heads, device):
            index = torch.arange(heads, device=device) // (heads // kv_heads) if own is None else own
            self._known = own, (heads, kv_heads, device), index, torch.cat((index, index + kv_heads))
        return self._known[2:]

    def _attend(
        self, parts: list[torch.Tensor], batch: PassBatch
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]]:
        """Causal attention over each sequence.

        Args:
            parts: queries, keys and values, [T, H, hd] each.

        Returns:
            The output [T, H * hd], and what turns its gradient into those of ``parts``.
        """
        shape = batch.rows, batch.length, parts[0].shape[1], self._head_dim
        by_sequence = [part.view(shape).transpose(1, 2) for part in parts]
        out, backward = decoder.attention(*by_sequence, scale=self._module.scaling)

        def before(grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
            grads = backward(grad.view(shape).transpose(1, 2))
            return tuple(found.transpose(1, 2).reshape(parts[0].shape) for found in grads)

        return out.transpose(1, 2).reshape(len(parts[0]), -1), before

    def _unrotated(
        self,
        grads: tuple[torch.Tensor, ...],
        state: BlockState,
        inverse_rms: list[torch.Tensor | None],
        batch: PassBatch,
    ) -> torch.Tensor:
        """Gradient of the three projections' outputs, side by side as in ``state.read``."""
        grad_qkv = torch.empty_like(state.read)
        targets, found = self._parts(grad_qkv), list(grads)
        kv_heads = targets[1].shape[1]
        index, _ = self._index(grads[0].shape[1], kv_heads, grad_qkv.device)
        if index is None:
            targets[2].copy_(found[2])
        else:
            # The sum of keys goes where it is turned in place, but for normalised ones.
            place = targets[1] if inverse_rms[1] is None else None
            found[1] = decoder.sum_kv(found[1], index, kv_heads, out=place)
            decoder.sum_kv(found[2], index, kv_heads, out=targets[2])
        raw = self._parts(state.read)
        for i, rstd in enumerate(inverse_rms):
            if rstd is None:
                decoder.rotary(found[i], batch.cos, batch.sin, inverse=True, out=targets[i])
                continue
            heads = decoder.rotary(found[i], batch.cos, batch.sin, inverse=True)
            rows = (heads.reshape(-1, self._head_dim), raw[i].reshape(-1, self._head_dim))
            weight = self._head_norms[i].weight.detach()
            targets[i].copy_(decoder.rms_norm_backward_(None, *rows, rstd, weight).view(targets[i].shape))
        return grad_qkv
