"""The surrogate by hand, and training to the budget with losses whose best gates are known."""

from __future__ import annotations

import pytest
import torch

from gisp.score.criteria.learned_gates.budget import Budget


def trained(worth: torch.Tensor, costs: torch.Tensor, target: float, steps: int) -> Budget:
    """Gates of structures of which each is worth ``worth * (1 - gate)^2`` of the loss."""
    budget = Budget(costs, target, steps=steps, rate=0.02, seed=0)
    for _ in range(steps):
        budget.step(-2 * worth * (1 - budget.gates))
    return budget


def test_gates_start_near_one_and_their_noise_is_of_the_seed() -> None:
    first, again, other = (Budget(torch.ones(5000), 0.5, steps=9, rate=0.02, seed=s).gates for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert float(first.mean()) == pytest.approx(1, abs=1e-3) and float(first.std()) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(("done", "middle"), [(0, 0.5), (1, 0.3), (4, 0.1)])
def test_the_surrogate_goes_from_closed_to_open_over_twice_its_middle(done: int, middle: float) -> None:
    budget = Budget(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), 0.5, steps=4, rate=1e-9, seed=0)
    for _ in range(done):
        budget.step(torch.zeros(5))
    with torch.no_grad():
        budget.z.copy_(torch.tensor([-3.0, 0.0, middle, 2 * middle, 5.0]))
    # The stretched sigmoid is within 0.02 of 0 at a closed gate and of 1 at twice the middle.
    assert float(budget.expected().detach()) == pytest.approx(1 + 2 + 4 * 0.5, abs=0.02 * 15)
    (grad,) = torch.autograd.grad(budget.expected(), budget.z)
    # A closed gate is pulled like one at zero, an open one half way up the most for its parameters.
    assert float(grad[0]) < 0 and float(grad[1]) == 2 * float(grad[0])
    assert float(grad[2]) == pytest.approx(-4 * 2.4 / middle * 1.2 / 4, rel=1e-4)


@pytest.mark.parametrize("target", [0.2, 0.5])
def test_training_closes_the_least_worth_up_to_the_budget(target: float) -> None:
    generator = torch.Generator().manual_seed(3)
    worth = torch.rand(400, generator=generator) / 400
    costs = torch.full((400,), 1 / 400)
    budget = trained(worth, costs, target, 400)
    closed = budget.gates == 0
    assert float(costs[closed].sum()) == pytest.approx(target, abs=0.03)
    # What closed is what is worth least.
    lowest = worth.argsort()[: int(closed.sum())]
    assert int(closed[lowest].sum()) >= 0.85 * int(closed.sum())
    assert float(budget.gates[~closed].min()) > 0.05


def test_structures_count_by_their_parameters() -> None:
    """Of equal worth those go that save more."""
    costs = torch.tensor([4.0] * 50 + [1.0] * 200) / 400
    budget = trained(torch.full((250,), 1e-3), costs, 0.3, 400)
    closed = budget.gates == 0
    assert float(costs[closed].sum()) == pytest.approx(0.3, abs=0.05)
    assert float(closed[:50].float().mean()) > float(closed[50:].float().mean())
