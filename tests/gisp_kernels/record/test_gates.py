"""Second-order scores of the recorder against gates written into the model and differentiated for every sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from recorder_oracle import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from gisp_kernels import Projection, StructureGroup, loss_change, record_importance


def gate_gradients(
    model: Block,
    batch: torch.Tensor,
    losses: Callable[[torch.Tensor], torch.Tensor],
    closed: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Float64 gradients [B, count] of gates on heads and channels, one backward pass for every sequence."""
    model = model.double()
    gates = {"attn": torch.ones(3, dtype=torch.float64), "mlp": torch.ones(21, dtype=torch.float64)}
    for name, gate in gates.items():
        if closed and name in closed:
            gate[closed[name]] = 0
        gate.requires_grad_()
    handles = [
        model.attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0] * gates["attn"].repeat_interleave(8),)),
        model.mlp.down_proj.register_forward_pre_hook(lambda _, args: (args[0] * gates["mlp"],)),
    ]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in gates}
    for loss in losses(model(batch.double())):
        for name, grad in zip(gates, torch.autograd.grad(loss, list(gates.values()), retain_graph=True), strict=True):
            found[name].append(grad)
    for handle in handles:
        handle.remove()
    model.float()
    return {name: torch.stack(rows) for name, rows in found.items()}


def prediction(grads: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    return 0.5 * (curvature.double()[:, None] * grads**2).sum(0) - grads.sum(0)


def by_sequence(output: torch.Tensor) -> torch.Tensor:
    """Terms of ``Block.loss``, the mean over the batch."""
    return output.pow(2).mean((1, 2)) / len(output)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("bias", [False, True])
def test_predictions_of_passes_add_up(bias: bool, frozen: bool) -> None:
    model = Block(bias=bias)
    batches = [torch.randn(3, 7, 16), torch.randn(2, 4, 16)]
    expected: dict[str, torch.Tensor] = {}
    for batch in batches:
        tokens = torch.full((len(batch),), float(batch.shape[0] * batch.shape[1]))
        for name, grads in gate_gradients(model, batch, by_sequence).items():
            expected[name] = expected.get(name, 0) + prediction(grads, tokens)
    model.requires_grad_(not frozen)
    with record_importance(model, mode="second-order") as recorder:
        for batch in batches:
            model.loss(batch).backward()
    found = recorder.scores()
    for name, values in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), values, rtol=1e-4, atol=1e-6 * float(values.abs().max()))
    assert any(values.min() < 0 < values.max() for values in expected.values())
    assert recorder.backward_calls == 2
    assert all(m.weight.grad is None for m in (model.attn.o_proj, model.mlp.down_proj))


def test_curvature_is_taken_for_every_sequence() -> None:
    model, batch, curvature = Block(), torch.randn(3, 7, 16), torch.tensor([2.0, 0.0, 50.0])
    expected = {name: prediction(g, curvature) for name, g in gate_gradients(model, batch, by_sequence).items()}
    with record_importance(model, mode="second-order") as recorder:
        recorder.curvature = curvature
        model.loss(batch).backward()
    for name, values in expected.items():
        torch.testing.assert_close(recorder.scores()[name].double(), values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, batch = Block(), torch.randn(2, 7, 16, requires_grad=True)
    with record_importance(model, mode="second-order") as plain:
        model.loss(batch).backward()
    model.wrap = functools.partial(checkpoint, use_reentrant=reentrant)
    with record_importance(model, mode="second-order") as recorder:
        model.loss(batch).backward()
    for name, values in plain.scores().items():
        torch.testing.assert_close(recorder.scores()[name], values)


def test_uses_of_one_layer_are_summed_before_squaring() -> None:
    linear, x = nn.Linear(6, 6, bias=False), torch.randn(2, 3, 6)
    gate = torch.ones(2, 3, requires_grad=True)
    wide = gate.repeat_interleave(2, 1)[:, None]
    out = linear(linear(x * wide) * wide)
    (grads,) = torch.autograd.grad(out.square().sum(), gate)
    with record_importance([StructureGroup("it", (Projection(linear, "column", 2),))], mode="second-order") as recorder:
        recorder.curvature = torch.tensor([0.1, 0.2])
        linear(linear(x)).square().sum().backward()
    expected = prediction(grads.double(), torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(recorder.scores()["it"].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_a_plain_layer(bias: bool) -> None:
    linear, x = nn.Linear(6, 4, bias=bias), torch.randn(2, 3, 6)
    gate = torch.ones(2, 4, requires_grad=True)
    product = nn.functional.linear(x, linear.weight) * gate[:, None]
    loss = (product if linear.bias is None else product + linear.bias).square().sum()
    (grads,) = torch.autograd.grad(loss, gate)
    with record_importance({"it": linear}, mode="second-order") as recorder:
        recorder.curvature = torch.tensor([0.1, 0.2])
        linear(x).square().sum().backward()
    expected = prediction(grads.double(), torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(recorder.scores()["it"].double(), expected, rtol=1e-4, atol=1e-5)


def test_sums_are_of_this_mode_alone() -> None:
    model = Block()
    with pytest.raises(RuntimeError, match="mode 'signed' records no gates"):
        record_importance(model, mode="signed").gate_sums()
    with record_importance(model, mode="second-order") as recorder:
        model.loss(torch.randn(2, 7, 16)).backward()
    found = recorder.gate_sums()
    assert {name: tuple(values.shape) for name, values in found.items()} == {"attn": (3, 3), "mlp": (3, 21)}
    for name, values in found.items():
        assert torch.equal(loss_change(values), recorder.scores()[name])
        # All sequences have the same factor: 14 tokens.
        torch.testing.assert_close(values[1], 14 * values[2])


def test_sequences_of_one_sample_are_added_before_squaring() -> None:
    model, batch, curvature = Block(), torch.randn(3, 7, 16), torch.tensor([2.0, 50.0])
    expected = {}
    for name, grads in gate_gradients(model, batch, by_sequence).items():
        expected[name] = prediction(torch.stack([grads[0] + grads[2], grads[1]]), curvature)
    with record_importance(model, mode="second-order") as recorder:
        recorder.curvature, recorder.samples = curvature, torch.tensor([0, 1, 0])
        model.loss(batch).backward()
    for name, values in expected.items():
        torch.testing.assert_close(recorder.scores()[name].double(), values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("curvature", [None, torch.ones(2)])
def test_samples_that_do_not_fit_are_refused(curvature: torch.Tensor | None) -> None:
    model = Block()
    with record_importance(model, mode="second-order") as recorder:
        recorder.curvature, recorder.samples = curvature, torch.zeros(2 if curvature is None else 3, dtype=torch.long)
        loss = model.loss(torch.randn(2, 7, 16))
        with pytest.raises(RuntimeError, match="samples need curvature and one number for each of 2 sequences"):
            loss.backward()


def test_a_graph_from_before_is_refused() -> None:
    model = Block()
    loss = model.loss(torch.randn(2, 7, 16))
    with (
        record_importance(model, mode="second-order"),
        pytest.raises(RuntimeError, match="forward inside the recorder"),
    ):
        loss.backward()


def test_a_curvature_of_another_batch_is_refused() -> None:
    model = Block()
    with record_importance(model, mode="second-order") as recorder:
        recorder.curvature = torch.ones(3)
        loss = model.loss(torch.randn(2, 7, 16))
        with pytest.raises(RuntimeError, match=r"curvature has shape \(3,\).* saw 2 sequences"):
            loss.backward()


def test_two_structures_of_one_layer_are_refused() -> None:
    linear = nn.Linear(8, 8)
    groups = [StructureGroup(f"by {block}", (Projection(linear, "column", block),)) for block in (4, 1)]
    with pytest.raises(ValueError, match="another group scores this layer in other structures"):
        record_importance(groups, mode="second-order")


def test_a_group_without_an_output_projection_is_refused() -> None:
    layers = [Projection(nn.Linear(4, 4), "row"), Projection(nn.Linear(4, 4), "row")]
    with pytest.raises(ValueError, match="second-order scores need its output projection"):
        record_importance([StructureGroup("it", tuple(layers))], mode="second-order")


CLOSED = {"attn": torch.tensor([False, True, False]), "mlp": torch.arange(21) % 3 == 0}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_gates_that_stand_at_zero(frozen: bool) -> None:
    model, batch = Block(bias=True), torch.randn(3, 7, 16)
    expected = gate_gradients(model, batch, by_sequence, CLOSED)
    model.requires_grad_(not frozen)
    with record_importance(model, mode="second-order", closed=CLOSED) as recorder:
        output = model(batch)
        by_sequence(output).sum().backward()
        with torch.no_grad():
            assert torch.equal(model(batch), output)
    for name, grads in expected.items():
        found = recorder.gate_sums()[name]
        torch.testing.assert_close(found[0], grads.sum(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[2], grads.square().sum(0), rtol=1e-4, atol=1e-8)
        assert bool((found[0][CLOSED[name]] != 0).all())


def test_closed_gates_that_do_not_fit_are_refused() -> None:
    model, linear = Block(), nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"closed names group 'mlp'.*mode 'second-order'"):
        record_importance(model, mode="signed", closed={"mlp": CLOSED["mlp"]})
    with pytest.raises(ValueError, match="closed names group 'other'"):
        record_importance(model, mode="second-order", closed={"other": CLOSED["mlp"]})
    with pytest.raises(ValueError, match=r"group 'mlp' must be bool \[21\], got torch.bool \[3\]"):
        record_importance(model, mode="second-order", closed={"mlp": CLOSED["attn"]})
    with pytest.raises(ValueError, match="only structures with an output projection"):
        record_importance({"it": linear}, mode="second-order", closed={"it": torch.zeros(4, dtype=torch.bool)})
