"""Optimizer state follows: training a compacted model is training the masked one, and steps undo with their state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cut_models import CASES, Case, case

from gisp_kernels import Compactor, Projection, StructureGroup

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
}


def train(found: Case, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        found.output().square().mean().backward()
        optimizer.step()


def numbers(name: str, *steps: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """For every parameter the elements of the dense one that a compacted one shows."""
    found = case(name)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
    compactor = Compactor(found.groups)
    for step in steps:
        compactor.remove(step)
    return {key: p.detach().long() for key, p in found.model.named_parameters()}


def state_of(found: Case, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and all their state, by name."""
    named = dict(found.model.named_parameters())
    return {key: p.detach().clone() for key, p in named.items()} | {
        f"{key} {name}": value.clone()
        for key, p in named.items()
        for name, value in optimizer.state[p].items()
        if value is not None and value.dim()
    }


def assert_part(mine: dict[str, torch.Tensor], dense: dict[str, torch.Tensor], shown: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == dense.keys()
    for key, value in mine.items():
        expected = dense[key].flatten()[shown[key.split()[0]]]
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_the_masked_model(name: str, kind: str) -> None:
    mine, masked = case(name), case(name)
    optimizer, other = (OPTIMIZERS[kind](found.model.parameters()) for found in (mine, masked))
    train(mine, optimizer)
    train(masked, other)
    compactor = Compactor(mine.groups, optimizer=optimizer)
    removed: dict[str, list[int]] = {}
    for number, step in enumerate(mine.steps, start=1):
        compactor.remove(step)
        for group, structures in step.items():
            removed[group] = removed.get(group, []) + structures
        for _ in range(2):
            train(mine, optimizer, 1)
            masked.mask(removed)
            train(masked, other, 1)
        shown = numbers(name, *mine.steps[:number])
        assert_part(state_of(mine, optimizer), state_of(masked, other), shown)


@pytest.mark.parametrize("name", CASES)
def test_what_comes_back_has_the_state_it_left_with(name: str) -> None:
    found = case(name)
    optimizer = OPTIMIZERS["adam"](found.model.parameters())
    train(found, optimizer)
    states = [state_of(found, optimizer)]
    compactor = Compactor(found.groups, optimizer=optimizer)
    for step in found.steps:
        compactor.remove(step)
        states.append(state_of(found, optimizer))
    for _ in found.steps:
        states.pop()
        compactor.rollback()
        now = state_of(found, optimizer)
        assert now.keys() == states[-1].keys() and all(torch.equal(now[key], states[-1][key]) for key in now)
    compactor.remove(found.steps[0])
    train(found, optimizer)
    trained = state_of(found, optimizer)
    compactor.rollback()
    shown, now = numbers(name, found.steps[0]), state_of(found, optimizer)
    for key, value in now.items():
        lines, before = shown[key.split()[0]], states[0][key].flatten()
        gone = torch.ones(value.numel(), dtype=torch.bool)
        gone[lines.flatten()] = False
        assert torch.equal(value.flatten()[lines], trained[key]), key
        assert torch.equal(value.flatten()[gone], before[gone]), key


@pytest.mark.parametrize("name", ["fused", "channels last"])
def test_state_that_comes_later_and_state_that_is_loaded(name: str) -> None:
    found = case(name)
    optimizer = OPTIMIZERS["momentum"](found.model.parameters())
    compactor = Compactor(found.groups, optimizer=optimizer)
    compactor.remove(found.steps[0])
    train(found, optimizer)
    early = state_of(found, optimizer)
    compactor.remove(found.steps[1])
    loaded = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(loaded)
    train(found, optimizer)
    late = state_of(found, optimizer)
    compactor.rollback()
    now = state_of(found, optimizer)
    first, both = numbers(name, found.steps[0]), numbers(name, *found.steps)
    for key, value in now.items():
        stayed = torch.isin(first[key.split()[0]], both[key.split()[0]])
        assert torch.equal(value[~stayed], early[key][~stayed]), key
        assert torch.equal(value[stayed].sort().values, late[key].flatten().sort().values), key
    compactor.rollback()
    shown = numbers(name, found.steps[0])
    for key, value in state_of(found, optimizer).items():
        if " " in key:
            gone = torch.ones(value.numel(), dtype=torch.bool)
            gone[shown[key.split()[0]].flatten()] = False
            assert not value.flatten()[gone].any(), f"{key}: nothing was known of what went before it came"


def test_packing_takes_the_state_along() -> None:
    found = case("convolutions")
    optimizer = OPTIMIZERS["adam"](found.model.parameters())
    train(found, optimizer)
    compactor = Compactor(found.groups, optimizer=[optimizer])
    compactor.remove(found.steps[0])
    compactor.pack()
    moment = optimizer.state[found.model.second.weight]["exp_avg"]
    assert moment.shape == found.model.second.weight.shape
    assert moment.untyped_storage().nbytes() == moment.numel() * moment.element_size()
    train(found, optimizer)
    compactor.remove(found.steps[1])
    train(found, optimizer)


def test_training_goes_on_after_a_step_inside_inference_mode() -> None:
    found = case("fused")
    optimizer = OPTIMIZERS["adam"](found.model.parameters())
    compactor = Compactor(found.groups, optimizer=optimizer)
    compactor.remove(found.steps[0])
    train(found, optimizer)
    with torch.inference_mode():
        compactor.remove(found.steps[1])
    train(found, optimizer)
    with torch.inference_mode():
        compactor.pack()
    train(found, optimizer)


def test_state_without_lines_is_refused() -> None:
    found = case("fused")
    parameters = list(found.model.parameters())
    optimizer = torch.optim.Adafactor(parameters)
    compactor = Compactor(found.groups, optimizer=optimizer)
    compactor.remove({"heads": [1]})
    train(found, optimizer)
    before = [p.detach().clone() for p in parameters]
    message = (
        "state 'row_var' that Adafactor keeps for the weight of projection 0 of group 'heads' does not have its shape"
    )
    for action in (lambda: compactor.remove({"heads": [0]}), compactor.rollback, compactor.pack):
        with pytest.raises(ValueError, match=message):
            action()
    assert compactor.kept("heads") == 3 and all(map(torch.equal, before, parameters))


def test_an_optimizer_of_another_model_is_refused() -> None:
    optimizer = OPTIMIZERS["adam"](case("fused").model.parameters())
    with pytest.raises(ValueError, match="the Adam holds no parameter of these groups"):
        Compactor(case("fused").groups, optimizer=optimizer)


FUSED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


@pytest.mark.parametrize("kind", FUSED)
def test_a_fused_step_over_gaps_is_refused_and_right_once_packed(kind: str) -> None:
    mine, masked = case("fused"), case("fused")
    compactors = [Compactor(found.groups) for found in (mine, masked)]
    for compactor in compactors:
        for step in mine.steps[:1]:
            compactor.remove(step)
    optimizer = FUSED[kind](mine.model.parameters())
    before = {key: p.detach().clone() for key, p in mine.model.named_parameters()}
    stored = [store.clone() for store in compactors[0].storage(mine.groups[0].name)]
    with pytest.raises(RuntimeError, match=r"pass fused=False .* or call Compactor.pack\(\)"):
        train(mine, optimizer)
    assert all(torch.equal(p, before[key]) for key, p in mine.model.named_parameters())
    assert all(map(torch.equal, compactors[0].storage(mine.groups[0].name), stored))
    compactors[0].pack()
    train(mine, optimizer)
    # The same optimizer, without the fused step, may have gaps.
    plain = FUSED[kind](masked.model.parameters())
    plain.param_groups[0]["fused"] = False
    train(masked, plain)
    for (key, mine_p), other in zip(mine.model.named_parameters(), masked.model.parameters(), strict=True):
        torch.testing.assert_close(mine_p, other, msg=key)


@pytest.mark.parametrize("kind", FUSED)
def test_a_fused_step_may_have_fewer_rows(kind: str) -> None:
    linear = torch.nn.Linear(4, 6)
    compactor = Compactor([StructureGroup("rows", (Projection(linear, "row"),))])
    compactor.remove({"rows": [1, 2]})
    optimizer = FUSED[kind](linear.parameters())
    linear(torch.ones(2, 4)).sum().backward()
    before, (weight, _) = linear.weight.detach().clone(), compactor.storage("rows")
    gone = weight[4:].clone()
    optimizer.step()
    assert not (linear.weight == before).any()
    assert torch.equal(weight[4:], gone)
