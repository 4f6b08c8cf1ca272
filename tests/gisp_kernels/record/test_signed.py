"""Signed scores against sums of W * G from autograd's own weight gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from recorder_oracle import Block, grad_of, signed_scores
from torch import nn
from torch.utils.checkpoint import checkpoint

from gisp_kernels import Projection, StructureGroup, record_importance


def assert_scores(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.float32
        # Terms of both signs cancel: what float32 products lose is relative to the largest sums.
        torch.testing.assert_close(found[name].double(), values, rtol=1e-5, atol=1e-6 * float(values.max()))


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("bias", [False, True])
def test_sum_over_passes_before_the_absolute_value(bias: bool, frozen: bool) -> None:
    model = Block(bias=bias)
    batches = [torch.randn(2, 7, 16), torch.randn(1, 4, 16)]
    expected = signed_scores(model, *batches)
    model.requires_grad_(not frozen)
    with record_importance(model, mode="signed") as recorder:
        for batch in batches:
            model.loss(batch).backward()
    assert_scores(recorder.scores(), expected)
    assert recorder.backward_calls == 2
    assert all(m.weight.grad is None for m in model.modules() if isinstance(m, nn.Linear))


def test_it_is_the_gradient_of_a_gate() -> None:
    model, batch = Block(bias=False), torch.randn(2, 7, 16)
    with record_importance(model, mode="signed") as recorder:
        model.loss(batch).backward()
    gate = torch.ones(21, requires_grad=True)

    def gated(x: torch.Tensor) -> torch.Tensor:
        mlp = model.mlp
        inner = nn.functional.silu(mlp.gate_proj(x) * gate) * (mlp.up_proj(x) * gate)
        return mlp.down_proj(inner * gate)

    x = batch + model.attn(batch)
    ((x + gated(x)).float().pow(2).mean()).backward()
    torch.testing.assert_close(recorder.scores()["mlp"], grad_of(gate).abs(), rtol=1e-4, atol=1e-7)


def test_graphs_from_before_and_inside_add_up() -> None:
    model, batches = Block(), [torch.randn(2, 7, 16), torch.randn(2, 5, 16)]
    expected = signed_scores(model, *batches)
    before = model.loss(batches[0])
    with record_importance(model, mode="signed") as recorder:
        before.backward()
        model.loss(batches[1]).backward()
    assert_scores(recorder.scores(), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, batch = Block(), torch.randn(2, 7, 16, requires_grad=True)
    expected = signed_scores(model, batch)
    model.wrap = functools.partial(checkpoint, use_reentrant=reentrant)
    with record_importance(model, mode="signed") as recorder:
        model.loss(batch).backward()
    assert_scores(recorder.scores(), expected)


def test_columns_alone_need_no_gradient_of_the_input() -> None:
    linear, x = nn.Linear(6, 4), torch.randn(5, 6)
    (linear(x).square().sum()).backward()
    expected = (linear.weight * grad_of(linear.weight)).detach().view(4, 3, 2).sum((0, 2)).abs()
    linear.zero_grad()
    with record_importance([StructureGroup("it", (Projection(linear, "column", 2),))], mode="signed") as recorder:
        linear(x).square().sum().backward()
    torch.testing.assert_close(recorder.scores()["it"], expected, rtol=1e-5, atol=1e-6)
    assert x.grad is None


def test_reset_forgets_and_gradients_of_the_input_are_unchanged() -> None:
    model, batch = Block(), torch.randn(2, 7, 16, requires_grad=True)
    expected = torch.autograd.grad(model.loss(batch), batch)[0]
    with record_importance(model, mode="signed") as recorder:
        model.loss(batch).backward()
        recorder.reset()
        assert not any(values.any() for values in recorder.scores().values())
    torch.testing.assert_close(batch.grad, expected)
