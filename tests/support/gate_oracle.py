"""Second-order scores from gates written into a model: float64, one sequence and one backward pass at a time.

Nothing of the package is imported but the structure map's names and shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch


def gate_scores(
    model: Any, rows: Any, weights: list[float], groups: list[tuple[str, torch.nn.Linear, int]]
) -> dict[str, torch.Tensor]:
    """``sum_b c_b g_b^2 / 2 - sum_b g_b`` of every gate, with ``g_b = w_b dNLL_b/dgate`` and ``c_b = n_b / |w_b|``.

    Args:
        rows: (input_ids [S], labels [S]) of each sequence.
        weights: of each sequence in the loss.
        groups: name, output projection and columns of a structure.
    """

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> Callable[[Any], torch.Tensor]:
        return lambda double: torch.nn.functional.cross_entropy(
            double(ids[None]).logits[0, :-1], labels[1:], ignore_index=-100
        )

    tokens = [int((labels[1:] != -100).sum()) for _, labels in rows]
    parts = [(loss_of(*row), w, n / abs(w)) for row, w, n in zip(rows, weights, tokens, strict=True)]
    return unit_scores(model, parts, groups)


def unit_scores(
    model: Any,
    parts: list[tuple[Callable[[Any], torch.Tensor], float, float]],
    groups: list[tuple[str, torch.nn.Linear, int]],
) -> dict[str, torch.Tensor]:
    """``sum_u c_u g_u^2 / 2 - sum_u g_u`` of every gate, for a loss that is a weighted sum of independent parts.

    Args:
        parts: loss of a float64 model, its weight ``w``, and ``c``; ``g`` is the gradient of ``w`` times the loss.
    """
    memo: dict[int, Any] = {}
    double = copy.deepcopy(model, memo).double().eval()
    gates, handles = {}, []
    for name, linear, block in groups:
        gate = torch.ones(linear.weight.shape[1] // block, dtype=torch.float64, requires_grad=True)
        gates[name] = gate

        def scale(_: Any, args: Any, gate: torch.Tensor = gate, block: int = block) -> tuple[torch.Tensor]:
            return (args[0] * gate.repeat_interleave(block),)

        handles.append(memo[id(linear)].register_forward_pre_hook(scale))
    found = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    for loss, weight, factor in parts:
        grads = torch.autograd.grad(weight * loss(double), list(gates.values()))
        for name, grad in zip(gates, grads, strict=True):
            found[name] += factor * grad.square() / 2 - grad
    for handle in handles:
        handle.remove()
    return {name: values.detach() for name, values in found.items()}
