"""Forward and backward of an attention block with its norm, without autograd around the projections.

Kept for the backward pass: the block's input and its inverse RMS, and queries, keys and values. The attention output
is kept where there is memory for it; else it is recomputed, which costs little next to the projections.
"""

from __future__ import annotations

from typing import Any

import torch

from gisp.model.attention import KV_INDEX
from gisp.model.structures import LayerMap
from gisp.score.fused.batch import PassBatch
from gisp.score.fused.block import Attended, Block, BlockState, Wanted
from gisp.score.fused.products import Products, parameter
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
            turned = self._by_head(state.read, 0, heads + kv_heads)
            decoder.rotary(turned, batch.cos, batch.sin, out=turned, backend=batch.backend)
        attended = self._attend(state, batch)
        # Gates change the output in place.
        state.attended = None if self._name in batch.gates else attended
        return attended.output

    def backward(
        self, state: BlockState, grad: torch.Tensor, batch: PassBatch, wanted: Wanted | None, input_grad: bool
    ) -> None:
        """As :meth:`Block.backward`."""
        if self.empty or not (input_grad or wanted is not None):
            return
        grad_attended = self._products.input_grad(grad, [self._leaver])
        attended = state.attended or self._attend(state, batch)
        state.attended = None
        if wanted is not None and wanted.observe is not None:
            wanted.observe(attended.output, grad)
            if not input_grad:
                return
        if wanted is not None and wanted.gates is not None:
            self._take_gates(wanted.gates, attended.output, grad_attended, batch)
            if not input_grad:
                return
        elements = None if wanted is None else wanted.elements
        if elements is not None:
            self._score_leaver(elements, grad, attended.output)
        heads, kv_heads = self._counts()
        grads = attended.before(self._by_sequence(self._through_gates(grad_attended, batch), batch, 0, heads))
        inverse_rms = attended.inverse_rms
        del attended, grad_attended
        index, _ = self._index(heads, kv_heads, grad.device)
        grad_qkv = decoder.unrotate_qkv(grads, batch.cos, batch.sin, index, kv_heads, backend=batch.backend)
        del grads
        self._before_norms(grad_qkv, state, inverse_rms)
        self._to_input(state, grad, grad_qkv, elements, input_grad, batch)

    def _counts(self) -> tuple[int, int]:
        """Query heads and key/value heads."""
        query, key, _ = self._readers
        size = self._head_dim
        return parameter(query, "weight").shape[0] // size, parameter(key, "weight").shape[0] // size

    def _by_head(self, columns: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """So many heads of [T, n * hd] from one on, as [T, count, hd]."""
        tokens, pitch = columns.shape
        size = self._head_dim
        # One view takes the host a third of what slices of views take.
        return columns.as_strided((tokens, count, size), (pitch, size, 1), columns.storage_offset() + first * size)

    def _by_sequence(self, columns: torch.Tensor, batch: PassBatch, first: int, count: int) -> torch.Tensor:
        """The same as [rows, count, length, hd]."""
        pitch, size, length = columns.shape[1], self._head_dim, batch.length
        shape, strides = (batch.rows, count, length, size), (length * pitch, size, pitch, 1)
        return columns.as_strided(shape, strides, columns.storage_offset() + first * size)

    def _operands(
        self, state: BlockState, batch: PassBatch
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], list[torch.Tensor]]:
        """What attention reads: rotated queries and keys and the values, [rows, H, length, hd] each with a key and a
        value for every query head. And the inverse RMS of normalised heads."""
        heads, kv_heads = self._counts()
        index, of_both = self._index(heads, kv_heads, state.read.device)
        if self._head_norms[0] is not None:
            return self._normed(state, batch, heads, kv_heads, index)
        query = self._by_sequence(state.read, batch, 0, heads)
        columns, first = state.read, heads
        if of_both is not None:
            # Keys and values lie side by side and are one launch.
            beside = self._by_head(state.read, heads, 2 * kv_heads)
            columns = decoder.expand_kv(beside, of_both, backend=batch.backend).view(len(state.read), -1)
            first = 0
        key, value = (self._by_sequence(columns, batch, first + i * heads, heads) for i in (0, 1))
        return (query, key, value), []

    def _normed(
        self, state: BlockState, batch: PassBatch, heads: int, kv_heads: int, index: torch.Tensor | None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], list[torch.Tensor]]:
        """The same where queries and keys are normalised before they are turned."""
        parts = list(self._by_head(state.read, 0, heads + 2 * kv_heads).split((heads, kv_heads, kv_heads), dim=1))
        inverse_rms = []
        for i, norm in enumerate(self._head_norms):
            rows = parts[i].reshape(-1, self._head_dim)
            _, normed, rstd = decoder.add_rms_norm(rows, None, norm.weight.detach(), norm.variance_epsilon)
            turned = normed.view(parts[i].shape)
            parts[i] = decoder.rotary(turned, batch.cos, batch.sin, out=turned, backend=batch.backend)
            inverse_rms.append(rstd)
        if index is not None:
            parts[1:] = [decoder.expand_kv(part, index, backend=batch.backend) for part in parts[1:]]
        query, key, value = (part.unflatten(0, (batch.rows, batch.length)).transpose(1, 2) for part in parts)
        return (query, key, value), inverse_rms

    def _index(
        self, heads: int, kv_heads: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which key/value head every query head uses, int64 [H], and which keys and then values, int64 [2 H], of heads
        beside one another; ``None`` where each has its own."""
        own: torch.Tensor | None = self._module._buffers.get(KV_INDEX)
        if own is None and heads == kv_heads:
            return None, None
        # A step asks three times a layer, and widths change between steps at most.
        if self._known is None or self._known[0] is not own or self._known[1] != (heads, kv_heads, device):
            index = torch.arange(heads, device=device) // (heads // kv_heads) if own is None else own
            self._known = own, (heads, kv_heads, device), index, torch.cat((index, index + kv_heads))
        return self._known[2:]

    def _attend(self, state: BlockState, batch: PassBatch) -> Attended:
        """Causal attention over each sequence."""
        operands, inverse_rms = self._operands(state, batch)
        out, before = decoder.attention(*operands, scale=self._module.scaling)
        rows, heads, length, size = out.shape
        return Attended(out.transpose(1, 2).reshape(rows * length, heads * size), before, inverse_rms)

    def _before_norms(self, grad_qkv: torch.Tensor, state: BlockState, inverse_rms: list[torch.Tensor]) -> None:
        """Turn gradients of normalised queries and keys into those of what their norms read, in place."""
        start = 0
        for norm, rstd, linear in zip(self._head_norms, inverse_rms, self._readers, strict=False):
            stop = start + linear.weight.shape[0]
            part = grad_qkv[:, start:stop]
            grad, raw = (columns.reshape(-1, self._head_dim) for columns in (part, state.read[:, start:stop]))
            part.copy_(decoder.rms_norm_backward_(None, grad, raw, rstd, norm.weight.detach()).view(part.shape))
            start = stop
