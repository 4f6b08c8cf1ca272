"""Worth of structures present and gone against gates written into a float64 model, some of them at 0."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_tokens

from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.score.context import Context
from gisp.score.first_order import shrinkage
from gisp.score.gradient import GradientScorer
from gisp.score.worth import structure_worth

STEPS = range(3, 6)


def made(family: str, gqa: str = "query") -> tuple[Any, Context]:
    model = tiny_model(family)
    model_map = map_model(model, gqa)
    data = Sequences.plain([(row, row) for row in tiny_tokens(24, 12)])
    config = make_config(batch_tokens=48, device="cpu", dtype="float32", gqa=gqa)
    return model, Context(ShrinkableModel(model_map), data, config)


def closed_gates(context: Context) -> dict[str, torch.Tensor]:
    """About a third of every group but those of layer 0."""
    groups = [group for group in context.map.groups if not group.name.startswith("layers.0.")]
    return {group.name: (torch.arange(group.count) + i) % 3 == 1 for i, group in enumerate(groups)}


def gate_gradients(model: Any, context: Context, closed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float64 [sequences, count], of the mean NLL of every sequence of the steps; one backward pass each."""
    memo: dict[int, Any] = {}
    double = copy.deepcopy(model, memo).double().eval()
    gates, handles = {}, []
    for group in context.map.groups:
        if group.name not in closed:
            continue
        (out,) = [projection for projection in group.projections if projection.axis == "column"]
        gate = (~closed[group.name]).double().requires_grad_()
        gates[group.name] = gate

        def scale(_: Any, args: Any, gate: torch.Tensor = gate, block: int = out.block) -> tuple[torch.Tensor]:
            return (args[0] * gate.repeat_interleave(block),)

        handles.append(memo[id(out.linear)].register_forward_pre_hook(scale))
    found: dict[str, list[torch.Tensor]] = {name: [] for name in gates}
    for step in STEPS:
        for number in context.steps.numbers(step):
            ids = context.data.rows[number][0]
            loss = torch.nn.functional.cross_entropy(double(ids[None]).logits[0, :-1], ids[1:])
            for name, grad in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                found[name].append(grad)
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("way", ["fused", "autograd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_worth_is_that_of_gates(family: str, way: str) -> None:
    check(family, "query", way)


@pytest.mark.parametrize("way", ["fused", "autograd"])
def test_worth_of_whole_key_value_heads(way: str) -> None:
    check("llama-gqa", "group", way)


def check(family: str, gqa: str, way: str) -> None:
    model, context = made(family, gqa)
    closed = closed_gates(context)
    truth = gate_gradients(model, context, closed)
    scorer = GradientScorer(context)
    if way == "autograd":
        scorer.refused = "asked to"
    groups = [group for group in context.map.groups if group.name in closed]
    found = structure_worth(scorer, STEPS, groups, closed)
    assert (scorer.refused is None) == (way == "fused")
    assert found.tokens == 3 * 48
    for kind in ("heads", "channels"):
        names = [name for name in truth if name.endswith(kind)]
        for gone in (False, True):
            grads = torch.cat([truth[name][:, closed[name] == gone] for name in names], dim=1)
            count = len(grads)
            mean = grads.mean(0)
            sums = torch.stack((mean, 11 * grads.square().mean(0), grads.square().sum(0) / count**2))
            trust = shrinkage([sums], count, 1.0)
            wanted = -trust * mean if gone else sums[1] / 2 - trust * mean
            values = torch.cat([found.values[name][closed[name] == gone] for name in names]).double()
            torch.testing.assert_close(values, wanted, rtol=2e-3, atol=2e-4 * float(wanted.abs().max()))


def test_the_loss_is_that_of_the_pruned_model() -> None:
    _, context = made("llama-gqa")
    closed = closed_gates(context)
    groups = [group for group in context.map.groups if group.name in closed]
    found = structure_worth(GradientScorer(context), STEPS, groups, closed)
    context.shrinkable.remove({name: torch.nonzero(gates).flatten() for name, gates in closed.items()})
    pruned = sum(float(context.forward_pass(step)[0]) for step in STEPS) / len(STEPS)
    assert float(found.loss) == pytest.approx(pruned, rel=1e-5)
