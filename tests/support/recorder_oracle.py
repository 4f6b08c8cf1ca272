"""A small model with attention and MLP, and its true scores from autograd's own weight gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from gisp_kernels import StructureGroup, iter_groups


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, hidden: int, width: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder block; ``wrap`` may be a checkpointing function around its halves."""

    def __init__(self, hidden: int = 16, heads: int = 3, head_dim: int = 8, width: int = 21, bias: bool = True) -> None:
        super().__init__()
        self.attn = Attention(hidden, heads, head_dim, bias)
        self.mlp = GatedMLP(hidden, width, bias)
        self.wrap: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda module, x: module(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.wrap(self.attn, x)
        return x + self.wrap(self.mlp, x)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).float().pow(2).mean()


def grad_of(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient that autograd left, which must be one."""
    assert tensor.grad is not None
    return tensor.grad


def weight_grads(loss: torch.Tensor, groups: Iterable[StructureGroup]) -> dict[nn.Linear, torch.Tensor]:
    """Weight gradients by ``torch.autograd.grad``, which leaves every ``.grad`` alone."""
    linears = [p.linear for group in groups for p in group.projections]
    grads = torch.autograd.grad(loss, [linear.weight for linear in linears])
    return dict(zip(linears, grads, strict=True))


def score(grads: dict[nn.Linear, torch.Tensor], groups: Iterable[StructureGroup]) -> dict[str, torch.Tensor]:
    """The definition: |W * G| summed over the elements of each structure, in float64."""
    scores = {}
    for group in groups:
        total = torch.zeros(group.count, dtype=torch.float64)
        for p in group.projections:
            product = (p.linear.weight.double() * grads[p.linear].double()).abs().detach().cpu()
            lines = product.sum(1 if p.axis == "row" else 0)
            total += lines.view(group.count, p.block).sum(1)
        scores[group.name] = total
    return scores


def signed_scores(model: Block, *batches: torch.Tensor) -> dict[str, torch.Tensor]:
    """The definition: |sum of W * G| over all elements of a structure and all batches, in float64."""
    groups = list(iter_groups(model))
    totals = {group.name: torch.zeros(group.count, dtype=torch.float64) for group in groups}
    for batch in batches:
        grads = weight_grads(model.loss(batch), groups)
        for group in groups:
            for p in group.projections:
                product = (p.linear.weight.double() * grads[p.linear].double()).detach()
                totals[group.name] += product.sum(1 if p.axis == "row" else 0).view(group.count, p.block).sum(1)
    return {name: total.abs() for name, total in totals.items()}


def true_scores(model: Block, *batches: torch.Tensor, exact: bool = False) -> dict[str, torch.Tensor]:
    """Scores of one backward pass per batch: summed afterwards, or (``exact``) gradients summed first."""
    groups = list(iter_groups(model))
    per_batch = [weight_grads(model.loss(x), groups) for x in batches]
    if exact:
        return score({linear: sum(g[linear] for g in per_batch) for linear in per_batch[0]}, groups)  # type: ignore[misc]
    all_scores = [score(grads, groups) for grads in per_batch]
    return {name: sum(s[name] for s in all_scores) for name in all_scores[0]}  # type: ignore[misc]


def assert_scores(scores: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert scores.keys() == truth.keys()
    for name, expected in truth.items():
        assert scores[name].dtype == torch.float32
        torch.testing.assert_close(scores[name].double(), expected, rtol=rtol, atol=0.0)
