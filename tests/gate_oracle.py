"""Second-order scores from gates written into a model: float64, one sequence and one backward pass at a time.

Nothing of the package is imported but the structure map's names and shapes.
"""

from __future__ import annotations

import copy
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
    for (ids, labels), weight in zip(rows, weights, strict=True):
        logits = double(ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100)
        tokens = int((labels[1:] != -100).sum())
        grads = torch.autograd.grad(nll, list(gates.values()))
        for name, grad in zip(gates, grads, strict=True):
            # c_b g_b^2 = n_b / |w_b| * w_b^2 * grad^2
            found[name] += tokens * abs(weight) * grad.square() / 2 - weight * grad
    for handle in handles:
        handle.remove()
    return {name: values.detach() for name, values in found.items()}
