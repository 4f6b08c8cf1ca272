"""Learned gates on a GPU: the same bits twice, and the gradients of a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokens

from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.model.modes import frozen
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.score.base import StepScores, make_scorer
from gisp.score.context import Context
from gisp.score.criteria.learned_gates.distillation import distilled
from gisp.score.criteria.learned_gates.gates import Gates

pytestmark = pytest.mark.gpu


def scored(model: Any, steps: int) -> StepScores:
    config = make_config(criterion="learned-gates", gate_steps=steps, gate_rate=0.1, batch_tokens=64, sparsity=0.3)
    shrinkable = ShrinkableModel(map_model(model, config.gqa))
    data = Sequences.plain([(row, row) for row in tiny_tokens(16)])
    return make_scorer(Context(shrinkable, data, config)).score(1, shrinkable.map.groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_trainings_are_equal_to_the_bit(dtype: torch.dtype) -> None:
    first, again = (scored(tiny_model().to("cuda", dtype), 30) for _ in range(2))
    assert first.loss == again.loss
    assert all(torch.equal(values, again.scores[name]) for name, values in first.scores.items())


def test_gradients_are_those_of_a_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model().to(device)
        gates = Gates(map_model(model).groups)
        gates.values = torch.linspace(0, 1.5, len(gates.values), device=device)
        with frozen(model), gates:
            logits = model(tiny_tokens(4).to(device)).logits
        labels, weights = tiny_tokens(4).to(device), torch.full((4,), 0.25, device=device)
        logits.backward(distilled(logits, logits.detach().roll(1, 0), labels, weights, 2.0).grad)
        found.append(gates.grad.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))
