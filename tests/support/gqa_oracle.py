"""Pruning by masks with plain autograd in float64, for models whose query heads share key/value heads.

Written from the definition of each mode alone: nothing of the package is used.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Masked:
    """A float64 copy of a model with zeros for what is removed.

    Attributes:
        heads, channels: by layer, the step at which each query head or channel went, 0 = kept.
    """

    model: Any
    heads: list[list[int]] = field(init=False)
    channels: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model).double().eval()
        config = self.model.config
        self.layers = list(self.model.model.layers)
        self.head_dim = self.layers[0].self_attn.head_dim
        self.hidden = config.hidden_size
        self.num_heads, self.num_kv = config.num_attention_heads, config.num_key_value_heads
        self.per_kv = self.num_heads // self.num_kv
        self.heads = [[0] * self.num_heads for _ in self.layers]
        self.channels = [[0] * config.intermediate_size for _ in self.layers]
        self.total = sum(p.numel() for p in self.model.model.layers.parameters())

    def products(self, ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """|W * dL/dW| of every projection, the loss being the mean over rows of their mean NLL."""
        self.model.zero_grad()
        logits = self.model(ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        found = []
        for layer in self.layers:
            linears = {n.split(".")[-1]: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
            # A projection without a gradient is an error of the test.
            grads = {n: m.weight.grad for n, m in linears.items() if m.weight.grad is not None}
            found.append({n: (m.weight * grads[n]).abs().detach() for n, m in linears.items()})
        return found

    def head_score(self, product: dict[str, torch.Tensor], head: int) -> float:
        lines = slice(head * self.head_dim, (head + 1) * self.head_dim)
        return float(product["q_proj"][lines].sum() + product["o_proj"][:, lines].sum())

    def kv_score(self, product: dict[str, torch.Tensor], kv: int) -> float:
        lines = slice(kv * self.head_dim, (kv + 1) * self.head_dim)
        return float(product["k_proj"][lines].sum() + product["v_proj"][lines].sum())

    def remove_heads(self, layer: int, heads: list[int], step: int) -> None:
        attention = self.layers[layer].self_attn
        with torch.no_grad():
            for head in heads:
                lines = slice(head * self.head_dim, (head + 1) * self.head_dim)
                attention.q_proj.weight[lines] = 0
                attention.o_proj.weight[:, lines] = 0
                self.heads[layer][head] = step

    def remove_channel(self, layer: int, channel: int, step: int) -> None:
        mlp = self.layers[layer].mlp
        with torch.no_grad():
            mlp.gate_proj.weight[channel] = 0
            mlp.up_proj.weight[channel] = 0
            mlp.down_proj.weight[:, channel] = 0
        self.channels[layer][channel] = step


def prune(model: Any, ids: torch.Tensor, gqa: str, *, sparsity: float, steps: int, protected: set[int]) -> Masked:
    """Equal steps of removed parameters, lowest normalised score first, ties in the order of listing."""
    state = Masked(model)
    spent = 0
    for step in range(1, steps + 1):
        products = state.products(ids)
        listed: list[tuple[float, int, int, list[int], int]] = []
        for layer, product in enumerate(products):
            if layer not in protected:
                listed += [(s / c, c, layer, heads, -1) for s, c, heads in _head_units(state, product, layer, gqa)]
        for layer, product in enumerate(products):
            if layer not in protected:
                for channel, gone in enumerate(state.channels[layer]):
                    score = product["gate_proj"][channel].sum() + product["up_proj"][channel].sum()
                    score += product["down_proj"][:, channel].sum()
                    cost = 3 * state.hidden
                    if not gone:
                        listed.append((float(score) / cost, cost, layer, [], channel))
        for _, cost, layer, heads, channel in sorted(listed, key=lambda unit: unit[0]):
            if spent + cost > sparsity * state.total * step / steps * (1 + 1e-12):
                break
            spent += cost
            if channel < 0:
                state.remove_heads(layer, heads, step)
            else:
                state.remove_channel(layer, channel, step)
    return state


def _head_units(
    state: Masked, product: dict[str, torch.Tensor], layer: int, gqa: str
) -> list[tuple[float, int, list[int]]]:
    """(score, parameters, query heads) of everything a layer's attention can lose as one."""
    area = state.head_dim * state.hidden
    live: list[list[tuple[float, int]]] = []
    for kv in range(state.num_kv):
        heads = [h for h in range(kv * state.per_kv, (kv + 1) * state.per_kv) if not state.heads[layer][h]]
        live.append([(state.head_score(product, h), h) for h in heads])
    if gqa == "query":
        return [(s, 2 * area, [h]) for members in live for s, h in members]
    if gqa == "balanced":
        ranked = [sorted(members) for members in live]
        return [
            (sum(s for s, _ in unit), len(unit) * 2 * area, [h for _, h in unit]) for unit in zip(*ranked, strict=True)
        ]
    cost = (2 * state.per_kv + 2) * area
    return [
        (sum(s for s, _ in members) + state.kv_score(product, kv), cost, [h for _, h in members])
        for kv, members in enumerate(live)
        if members
    ]
