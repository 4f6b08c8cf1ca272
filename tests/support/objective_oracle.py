"""Losses and scores by plain autograd over a float64 copy of a tiny model."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_model
from torch.nn import functional

from gisp.model.structures import map_model
from gisp_kernels.groups import StructureGroup


def double_model(family: str = "llama-gqa") -> tuple[Any, list[StructureGroup]]:
    """The tiny model in float64 (its norms and rotary tables stay float32, as transformers computes them)."""
    model = tiny_model(family)
    groups = map_model(model).groups
    return model.double(), groups


def mean_nll(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean NLL of one sequence without padding, in the model's precision."""
    return functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:], ignore_index=-100)


def gradients(loss: torch.Tensor, groups: list[StructureGroup]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [part.linear.weight for group in groups for part in group.projections]))


def scores(groups: list[StructureGroup], grads: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum of |W * G| per structure."""
    left, result = iter(grads), {}
    for group in groups:
        result[group.name] = torch.zeros(group.count, dtype=torch.float64)
        for part in group.projections:
            product = (part.linear.weight.detach() * next(left)).abs()
            result[group.name] += product.sum(1 if part.axis == "row" else 0).view(group.count, -1).sum(1)
    return result
