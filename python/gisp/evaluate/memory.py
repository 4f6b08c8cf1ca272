"""Memory that an evaluation takes of a device beside the weights, at most, counted from shapes for a plan.

Models may have no memory for their weights. Layers keep nothing: there is no backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gisp.evaluate.batches import vocabulary
from gisp.model.attention import kv_bytes_per_token

_FLOAT = 4
# Copies of a mask while it is made, one byte a number.
_MASKS = 3


def losses_bytes(model: Any, tokens: int) -> int:
    """Bytes that losses of so many tokens take at a time beside their logits: these in float32, and logarithms."""
    return 2 * _FLOAT * tokens * vocabulary(model)


def scoring_bytes(model: Any, tokens: int, losses: int, *, cached: bool = False) -> int:
    """Bytes of a batch whose logits are all taken.

    Args:
        tokens: of the batch, padding included.
        losses: bytes that are made of the logits at a time, beside them.
        cached: whether keys and values of all layers are kept.
    """
    size = _element_size(model)
    logits = tokens * vocabulary(model) * size + losses
    return _states(model, tokens) + max(_layer(model, tokens), logits) + cached * _cache(model, tokens)


def generating_bytes(model: Any, rows: int, prompt: int, new: int) -> int:
    """Bytes of a batch of prompts, padded to one length, that grows token by token with a key/value cache."""
    size, tokens = _element_size(model), rows * (prompt + new)
    masks = rows * prompt * prompt * (_MASKS + size)
    logits = rows * vocabulary(model) * (size + 3 * _FLOAT)
    # Of the layer at hand the cache is there twice while it grows.
    cache = _cache(model, tokens) * (1 + 1 / len(model.model.layers))
    return _states(model, tokens) + int(cache) + max(_layer(model, tokens) + masks, logits)


def batch_tokens(lengths: Sequence[int]) -> int:
    """Tokens of a batch of sequences that are padded to the longest."""
    return len(lengths) * max(lengths, default=0)


def _element_size(model: Any) -> int:
    return int(next(model.parameters()).element_size())


def _states(model: Any, tokens: int) -> int:
    """Hidden states between layers, beside what a layer makes of them."""
    return 2 * tokens * int(model.get_input_embeddings().embedding_dim) * _element_size(model)


def _layer(model: Any, tokens: int) -> int:
    """One layer at its busiest moment, some of it in float32: in its attention or in its MLP."""
    hidden = int(model.get_input_embeddings().embedding_dim)
    attention, widest = (
        max(max(p.shape) for block in blocks for p in block.parameters())
        for blocks in ([getattr(layer, "self_attn", layer) for layer in model.model.layers], model.model.layers)
    )
    return tokens * max(6 * hidden + 10 * attention, 4 * hidden + 4 * widest) * _element_size(model)


def _cache(model: Any, tokens: int) -> int:
    """Keys and values of all layers; of an unknown layout as many as there can be."""
    hidden = int(model.get_input_embeddings().embedding_dim)
    most = 2 * len(model.model.layers) * hidden * _element_size(model)
    return tokens * (kv_bytes_per_token(model) or most)
