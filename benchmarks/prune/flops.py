"""Floating-point operations of one importance pass: those it cannot do without.

A product of [m, k] and [k, n] counts 2 m k n. Counted are the products with weights alone: attention's own products
(some hundredths at 256 tokens a sequence), elementwise work and anything done twice to save memory count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.registry import Model


@dataclass(frozen=True)
class Widths:
    """What a decoder layer has left and what of it is scored.

    Attributes:
        heads, channels: query heads and MLP channels.
        scored: whether its structures may be removed; a block without any is not scored.
    """

    heads: int
    channels: int
    scored: bool = True

    @property
    def heads_scored(self) -> bool:
        return self.scored and self.heads > 0

    @property
    def channels_scored(self) -> bool:
        return self.scored and self.channels > 0


@dataclass(frozen=True)
class PassFlops:
    """Operations of a pass: forward, gradients of activations, and gradients of scored weights."""

    forward: int
    input_grad: int
    weight_grad: int

    @property
    def total(self) -> int:
        return self.forward + self.input_grad + self.weight_grad


def pass_flops(model: Model, layers: Sequence[Widths], tokens: int, *, weight_grads: bool = True) -> PassFlops:
    """Operations of one pass over ``tokens`` tokens.

    The backward pass ends at the lowest scored layer: there only what its scores need is formed. Every layer above it
    needs the gradient of its input. Weights are differentiated only where they are scored, and with shared key/value
    heads neither k nor v is. The output projection runs forward and, if anything is scored, backward to its input.

    Args:
        weight_grads: whether scores are made of weight gradients; second-order ones are not.
    """
    lowest = min((i for i, item in enumerate(layers) if item.heads_scored or item.channels_scored), default=len(layers))
    head = 2 * tokens * model.hidden * model.vocabulary
    forward, input_grad, weight_grad = head, head if lowest < len(layers) else 0, 0
    for i, item in enumerate(layers):
        query, key_value, channel = _products(model, item, tokens)
        forward += 2 * query + 2 * key_value + 3 * channel
        if item.channels_scored and weight_grads:
            weight_grad += 3 * channel
        if item.heads_scored and weight_grads:
            weight_grad += 2 * query if model.shares_kv else 2 * query + 2 * key_value
        if i < lowest:
            continue
        below = i > lowest
        # The MLP comes after attention: heads of the lowest layer need its gradient too.
        below_mlp = below or item.heads_scored
        if below_mlp or item.channels_scored:
            input_grad += channel
        if below_mlp:
            input_grad += 2 * channel
        if below or item.heads_scored:
            input_grad += query
        if below:
            input_grad += query + 2 * key_value
    return PassFlops(forward, input_grad, weight_grad)


def _products(model: Model, item: Widths, tokens: int) -> tuple[int, int, int]:
    """Operations of one product with q or o, with k or v, and with gate, up or down."""
    each = 2 * tokens * model.hidden
    key_value_heads = model.kv_heads if model.shares_kv else item.heads
    key_value = each * key_value_heads * model.head_dim if item.heads else 0
    return each * item.heads * model.head_dim, key_value, each * item.channels
