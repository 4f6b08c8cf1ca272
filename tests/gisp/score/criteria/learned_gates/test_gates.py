"""Gates against a multiplicative parameter of a float64 copy, closed and open ones, over several passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from score_cases import pruned
from tiny import tiny_model, tiny_tokens

from gisp.model.modes import frozen
from gisp.model.structures import map_model
from gisp.score.criteria.learned_gates.gates import Gates
from gisp_kernels.groups import StructureGroup

TOKENS = tiny_tokens(4, 12)


def by_autograd(model: Any, groups: list[StructureGroup], values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of their weighted sum by factors that autograd sees, in float64."""
    memo: dict[int, Any] = {}
    double = copy.deepcopy(model, memo).double()
    factors = values.double().requires_grad_()
    start = 0
    for group in groups:
        (output,) = (p for p in group.projections if p.axis == "column")
        gate = factors[start : start + group.count].repeat_interleave(output.block)
        memo[id(output.linear)].register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,))
        start += group.count
    logits = double(TOKENS).logits
    (grad,) = torch.autograd.grad((logits * weights(logits)).sum(), factors)
    return logits.detach(), grad


def weights(logits: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits).to(logits.dtype)


def assert_gradients(model: Any, groups: list[StructureGroup]) -> None:
    gates = Gates(groups)
    gates.values = torch.rand(len(gates.values)) * 1.5
    gates.values[::3] = 0
    gates.grad = torch.zeros_like(gates.values)
    expected_logits, expected = by_autograd(model, groups, gates.values)
    with frozen(model):
        for rows in (slice(0, 1), slice(1, 4)):
            with gates:
                logits = model(TOKENS[rows]).logits
            torch.testing.assert_close(logits, expected_logits[rows].float(), rtol=1e-4, atol=1e-4)
            logits.backward(weights(expected_logits)[rows].float())
    scale = float(expected.abs().max())
    torch.testing.assert_close(gates.grad.double(), expected, rtol=1e-4, atol=1e-5 * scale)
    assert float(gates.grad[gates.values == 0].abs().max()) > 1e-2 * scale


@pytest.mark.parametrize("family", ["llama-mha", "llama-bias", "qwen3"])
@pytest.mark.parametrize("gqa", ["query", "group"])
def test_gradients_are_those_of_a_factor(family: str, gqa: str) -> None:
    model = tiny_model(family)
    assert_gradients(model, map_model(model, gqa).groups)


def test_gradients_of_some_layers_of_a_pruned_model() -> None:
    model, model_map = pruned("llama-gqa", "empty")
    assert_gradients(model, [group for group in model_map.groups if group.count and ".1." not in group.name])


def test_a_model_is_as_it_was_once_gates_are_left() -> None:
    model = tiny_model()
    before = model(TOKENS).logits
    gates = Gates(map_model(model).groups)
    gates.values = torch.zeros_like(gates.values)
    with gates:
        assert not torch.equal(model(TOKENS).logits, before)
    assert torch.equal(model(TOKENS).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())
