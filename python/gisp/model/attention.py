"""Attention of pruned layers: uneven query heads per key/value head, and layers without any head.

Removing query heads leaves the key/value heads of a grouped-query layer shared unevenly. The keys and values are then
gathered per query head through an index before attention, which is exact and needs no re-layout inside the loop.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gisp.errors import GispError, quoted

INDEXED_ATTENTION = "gisp_indexed"
# Buffer of an attention module: int64 [query heads], the key/value head each uses.
KV_INDEX = "gisp_kv_index"


class _ExpandKeyValue(torch.autograd.Function):
    """``x[:, index]`` whose backward is a fixed-order sum instead of an atomic scatter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.kv_heads = x.shape[1]
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        batch, heads, tokens, dim = grad.shape
        one_hot = torch.zeros(ctx.kv_heads, heads, dtype=grad.dtype, device=grad.device)
        one_hot[index, torch.arange(heads, device=grad.device)] = 1
        summed = torch.matmul(one_hot, grad.reshape(batch, heads, tokens * dim))
        return summed.view(batch, ctx.kv_heads, tokens, dim), None


class _Expanded(NamedTuple):
    """What attention reads of a module once every query head has its own keys and values.

    Not the module's own group count, which would repeat them again.
    """

    is_causal: bool
    layer_idx: int


def indexed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention; query [B, H, T, hd], key and value [B, KV, S, hd].

    On a module with a key/value index (int64 [H]) query head ``h`` attends to key/value head ``index[h]``.
    """
    index = getattr(module, KV_INDEX, None)
    if index is not None:
        key = _ExpandKeyValue.apply(key, index)
        value = _ExpandKeyValue.apply(value, index)
        module = _Expanded(module.is_causal, module.layer_idx)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def use_indexed_attention(model: Any) -> None:
    """Route the model's attention through :func:`indexed_attention`, and no other way while heads are uneven."""
    model.set_attn_implementation(INDEXED_ATTENTION)
    for part in (model, model.model):
        # A pickle would look for a bound method under its name in the class.
        part.set_attn_implementation = partial(_set_attn_implementation, part)


def _set_attn_implementation(model: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    """Choose attention as the model's class does, unless layers have an index that others would not read.

    They would share the keys and values that are left among the query heads evenly.

    Raises:
        GispError: layers have one.
    """
    uneven = any(getattr(module, KV_INDEX, None) is not None for module in model.modules())
    if uneven and attn_implementation != INDEXED_ATTENTION:
        raise GispError(
            f"attention {quoted(attn_implementation)} takes no uneven key/value heads, which this pruned model has: "
            "export it (gisp.export_model) and load that with attn_implementation="
        )
    type(model).set_attn_implementation(model, attn_implementation, *args, **kwargs)


def set_kv_index(attention: nn.Module, index: torch.Tensor | None) -> None:
    """Give an attention module its key/value index, int64 [query heads], or with ``None`` its even groups back."""
    config: Any = attention.config
    if index is not None and config._attn_implementation != INDEXED_ATTENTION:
        # Another may have been chosen while heads were even.
        config._attn_implementation = INDEXED_ATTENTION
    attention.register_buffer(KV_INDEX, index, persistent=False)


def set_head_counts(attention: nn.Module, heads: int, kv_heads: int) -> None:
    """Tell an attention module that keeps the numbers of its heads what they are now."""
    for name, count in (("num_heads", heads), ("num_key_value_heads", kv_heads)):
        if hasattr(attention, name):
            setattr(attention, name, count)


# Here, because a pickled model finds its attention by importing this module.
AttentionInterface.register(INDEXED_ATTENTION, indexed_attention)
AttentionMaskInterface.register(INDEXED_ATTENTION, sdpa_mask)


class NoHeads(nn.Module):
    """Stands in for an attention that lost every head: it contributes its output bias alone.

    A cache still sees one zeroed head, so that sequence lengths read from this layer stay right.
    """

    attention: Any

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
        """The bias of o_proj or zeros, [B, S, hidden], and a cache that has grown by the tokens."""
        if past_key_values is not None:
            batch, tokens = hidden_states.shape[:2]
            zeros = hidden_states.new_zeros(batch, 1, tokens, self.attention.head_dim)
            past_key_values.update(zeros, zeros, self.attention.layer_idx)
        bias = self.attention.o_proj.bias
        output = torch.zeros_like(hidden_states)
        return (output if bias is None else output + bias), None


def kv_bytes_per_token(model: Any) -> int | None:
    """Bytes of keys and values a token needs, all layers, in the model's dtype; ``None`` for an unknown layout.

    Key/value heads that no query head is left to read are not counted.
    """
    total = 0
    for layer in getattr(getattr(model, "model", None), "layers", ()):
        attention: Any = getattr(layer, "self_attn", None)
        if isinstance(attention, NoHeads):
            continue
        if not hasattr(attention, "k_proj") or not hasattr(attention, "head_dim"):
            return None
        index = getattr(attention, KV_INDEX, None)
        width = attention.k_proj.out_features if index is None else len(index.unique()) * attention.head_dim
        total += 2 * int(width) * next(model.parameters()).element_size()
    return total or None
