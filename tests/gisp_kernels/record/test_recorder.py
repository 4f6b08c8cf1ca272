"""record_importance against autograd's own weight gradients, in every way a backward pass can run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from recorder_oracle import Attention, Block, GatedMLP, assert_scores, grad_of, score, true_scores, weight_grads
from torch import nn
from torch.utils.checkpoint import checkpoint

from gisp_kernels import Projection, StructureGroup, iter_groups, mlp_group, record_importance
from gisp_kernels.record.targets import Mode

MODES: tuple[Mode, ...] = ("stream", "exact")


def is_clean(model: nn.Module) -> bool:
    return not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules()) and not any(
        p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("mode", MODES)
def test_forward_inside(model: Block, batch: torch.Tensor, mode: Mode, frozen: bool) -> None:
    truth = true_scores(model, batch)
    expected = torch.autograd.grad(model.loss(batch), model.mlp.down_proj.bias)[0]
    model.requires_grad_(not frozen)
    with record_importance(model, mode=mode) as recorder:
        loss = model.loss(batch)
        loss.backward()
        assert_scores(recorder.scores(), truth)
    assert_scores(recorder.scores(), truth)
    assert recorder.backward_calls == 1
    assert all(m.weight.grad is None for m in model.modules() if isinstance(m, nn.Linear))
    if not frozen:
        torch.testing.assert_close(model.mlp.down_proj.bias.grad, expected)
    assert is_clean(model)


def test_an_exact_layer_is_read_by_one_launch(
    model: Block, batch: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gisp_kernels.triton import grouped_reduce

    launches: list[int] = []
    sums = grouped_reduce.partial_sums

    def counted(weights: Sequence[torch.Tensor], *rest: Any) -> Any:
        launches.append(len(weights))
        return sums(weights, *rest)

    monkeypatch.setattr(grouped_reduce, "partial_sums", counted)
    for power in (1, 2):
        with record_importance(model, mode="exact", power=power) as plain:
            model.loss(batch).backward()
        with record_importance(model, mode="exact", power=power, backend="triton") as recorder:
            model.loss(batch).backward()
        found, expected = recorder.scores(), plain.scores()
        assert list(found) == list(expected)
        for name, scores in expected.items():
            torch.testing.assert_close(found[name], scores)
    projections = sum(len(group.projections) for group in iter_groups(model))
    assert launches == [projections, projections]


@pytest.mark.parametrize("mode", MODES)
def test_forward_before(model: Block, batch: torch.Tensor, mode: Mode) -> None:
    truth = true_scores(model, batch)
    kept = torch.randn(21, 16)
    model.mlp.gate_proj.weight.grad = kept.clone()
    loss = model.loss(batch)
    with record_importance(model, mode=mode) as recorder:
        loss.backward()
    assert_scores(recorder.scores(), truth)
    assert recorder.backward_calls == 1
    assert torch.equal(model.mlp.gate_proj.weight.grad, kept)
    assert model.mlp.up_proj.weight.grad is None
    assert model.mlp.up_proj.bias.grad is not None
    assert is_clean(model)


def test_graphs_from_before_and_inside_count_once_each(model: Block, batch: torch.Tensor) -> None:
    other = torch.randn(1, 5, 16)
    early = model.loss(batch)
    with record_importance(model, mode="exact") as recorder:
        (early + model.loss(other)).backward()
    assert_scores(recorder.scores(), true_scores(model, batch, other, exact=True))
    assert recorder.backward_calls == 1


@pytest.mark.parametrize("mode", MODES)
def test_input_gradient_is_unchanged(model: Block, batch: torch.Tensor, mode: Mode) -> None:
    plain, recorded = batch.clone().requires_grad_(), batch.clone().requires_grad_()
    model.loss(plain).backward()
    with record_importance(model, mode=mode):
        model.loss(recorded).backward()
    assert torch.equal(grad_of(plain), grad_of(recorded))


@pytest.mark.parametrize("mode", MODES)
def test_several_backward_calls(model: Block, mode: Mode) -> None:
    batches = torch.randn(3, 2, 5, 16)
    with record_importance(model, mode=mode) as recorder:
        for batch in batches:
            model.loss(batch).backward()
    assert recorder.backward_calls == 3
    assert_scores(recorder.scores(), true_scores(model, *batches, exact=mode == "exact"))
    stream, exact = true_scores(model, *batches), true_scores(model, *batches, exact=True)
    assert all((stream[name] > exact[name] * 1.01).all() for name in stream)


def test_two_backward_calls_on_one_graph(model: Block, batch: torch.Tensor) -> None:
    truth = true_scores(model, batch)
    with record_importance(model) as recorder:
        loss = model.loss(batch)
        loss.backward(retain_graph=True)
        loss.backward()
    assert recorder.backward_calls == 2
    assert_scores(recorder.scores(), {name: 2 * value for name, value in truth.items()})


@pytest.mark.parametrize("inside", [True, False], ids=["forward inside", "forward before"])
@pytest.mark.parametrize("mode", MODES)
def test_two_uses_in_one_graph_are_summed_first(model: Block, batch: torch.Tensor, mode: Mode, inside: bool) -> None:
    groups = list(iter_groups(model))

    def loss() -> torch.Tensor:
        return model(model(batch)[:1]).pow(2).mean()

    truth = score(weight_grads(loss(), groups), groups)
    early = None if inside else loss()
    with record_importance(model, mode=mode) as recorder:
        (loss() if early is None else early).backward()
    assert_scores(recorder.scores(), truth)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing(model: Block, batch: torch.Tensor, mode: Mode, reentrant: bool, frozen: bool) -> None:
    truth = true_scores(model, batch)
    model.wrap = functools.partial(checkpoint, use_reentrant=reentrant)
    model.requires_grad_(not frozen)
    batch.requires_grad_()
    with record_importance(model, mode=mode) as recorder:
        model.loss(batch).backward()
        assert recorder.backward_calls == 1
        model.loss(batch).backward()
    assert recorder.backward_calls == 2
    assert_scores(recorder.scores(), {name: 2 * value for name, value in truth.items()})


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_forward_before(model: Block, batch: torch.Tensor, reentrant: bool) -> None:
    truth = true_scores(model, batch)
    model.wrap = functools.partial(checkpoint, use_reentrant=reentrant)
    loss = model.loss(batch.requires_grad_())
    with record_importance(model) as recorder:
        loss.backward()
    assert recorder.backward_calls == 1
    assert_scores(recorder.scores(), truth)
    assert model.mlp.up_proj.weight.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_autocast(model: Block, batch: torch.Tensor, mode: Mode) -> None:
    groups = list(iter_groups(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(batch)
        loss = plain.float().pow(2).mean()
    truth = score(weight_grads(loss, groups), groups)
    with record_importance(model, mode=mode) as recorder, torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch)
        assert torch.equal(output, plain)
        output.float().pow(2).mean().backward()
    assert_scores(recorder.scores(), truth, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_mode_rounds_nothing_below_float32(dtype: torch.dtype) -> None:
    linear = nn.Linear(9, 5, bias=False).to(dtype)
    x, dy = torch.randn(64, 9).to(dtype), torch.randn(64, 5).to(dtype)
    with record_importance([linear], mode="exact") as recorder:
        for _ in range(2):
            linear(x).backward(dy)
    grad = 2 * dy.double().T @ x.double()
    truth = (linear.weight.double() * grad).abs().sum(1)
    torch.testing.assert_close(recorder.scores()["0"].double(), truth.detach(), rtol=1e-5, atol=0.0)


def test_matrix_inputs_and_named_layers() -> None:
    layers = {"a": nn.Linear(6, 4), "b": nn.Linear(4, 3, bias=False)}
    x = torch.randn(5, 6)
    layers["b"](layers["a"](x)).sum().backward()
    truth = {k: (m.weight * grad_of(m.weight)).abs().sum(1).double().detach() for k, m in layers.items()}
    kept = grad_of(layers["a"].weight).clone()
    with record_importance(layers) as recorder:
        layers["b"](layers["a"](x)).sum().backward()
    assert_scores(recorder.scores(), truth)
    assert torch.equal(grad_of(layers["a"].weight), kept)


def test_one_layer_in_two_groups() -> None:
    linear = nn.Linear(6, 4)
    groups = [StructureGroup("rows", (Projection(linear, "row", 2),))]
    groups += [StructureGroup("columns", (Projection(linear, "column", 3), Projection(linear, "column", 3)))]
    x = torch.randn(5, 6)
    linear(x).pow(2).sum().backward()
    product = (linear.weight * grad_of(linear.weight)).abs().double().detach()
    truth = {"rows": product.sum(1).view(2, 2).sum(1), "columns": 2 * product.sum(0).view(2, 3).sum(1)}
    for mode in MODES:
        with record_importance(groups, mode=mode) as recorder:
            linear(x).pow(2).sum().backward()
        assert_scores(recorder.scores(), truth)


def test_forward_without_graph_has_no_effect(model: Block, batch: torch.Tensor) -> None:
    truth = true_scores(model, batch)
    with record_importance(model) as recorder:
        with torch.no_grad():
            assert not model(batch).requires_grad
        model.loss(torch.randn(1, 3, 16))
        assert recorder.backward_calls == 0
        model.loss(batch).backward()
    assert_scores(recorder.scores(), truth)


def test_gradients_of_activations_alone_are_not_scored(model: Block, batch: torch.Tensor) -> None:
    truth = true_scores(model, batch)
    batch.requires_grad_()
    with record_importance(model) as recorder:
        torch.autograd.grad(model.loss(batch), batch)
        model.loss(batch).backward()
    assert_scores(recorder.scores(), truth)


@pytest.mark.parametrize("mode", MODES)
def test_reset(model: Block, batch: torch.Tensor, mode: Mode) -> None:
    truth = true_scores(model, batch)
    recorder = record_importance(model, mode=mode)
    with recorder:
        model.loss(torch.randn(1, 3, 16)).backward()
        recorder.reset()
        assert recorder.backward_calls == 0
        assert all((s == 0).all() for s in recorder.scores().values())
        model.loss(batch).backward()
    with recorder:
        model.loss(batch).backward()
    assert recorder.backward_calls == 2
    assert_scores(recorder.scores(), {name: 2 * value for name, value in truth.items()})


def test_scores_are_copies(model: Block, batch: torch.Tensor) -> None:
    with record_importance(model) as recorder:
        model.loss(batch).backward()
        first = recorder.scores()
        kept = {name: value.clone() for name, value in first.items()}
        model.loss(batch).backward()
    assert all(torch.equal(first[name], kept[name]) for name in kept)


@pytest.mark.parametrize("where", ["body", "forward", "backward"])
def test_exceptions_restore_everything(model: Block, batch: torch.Tensor, where: str) -> None:
    truth = true_scores(model, batch)
    kept = torch.ones(21, 16)
    model.mlp.up_proj.weight.grad = kept.clone()
    early = model.loss(batch)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), record_importance(model):
        if where == "forward":
            model.wrap = fail  # type: ignore[assignment]
        # Registered after the recorder's own hook: the weight's .grad is set aside when this one fails.
        failing = model.mlp.up_proj.weight.register_hook(fail if where == "backward" else lambda grad: None)
        (early if where == "backward" else model.loss(batch)).backward()
        fail()
    failing.remove()
    assert is_clean(model)
    assert torch.equal(model.mlp.up_proj.weight.grad, kept)
    model.wrap = lambda module, x: module(x)
    with record_importance(model) as recorder:
        model.loss(batch).backward()
    assert_scores(recorder.scores(), truth)


def narrow(linear: nn.Linear, rows: int) -> None:
    linear.weight.data = linear.weight.data[:rows]
    linear.bias.data = linear.bias.data[:rows]
    linear.zero_grad()


@pytest.mark.parametrize("mode", MODES)
def test_width_change_while_recording(mode: Mode) -> None:
    linear, x = nn.Linear(6, 4), torch.randn(5, 6)
    recorder = record_importance([linear], mode=mode)
    with recorder:
        linear(x).sum().backward()
        narrow(linear, 3)
        with pytest.raises(RuntimeError, match=r"from \(4, 6\) to \(3, 6\) while being recorded"):
            linear(x)
        with pytest.raises(RuntimeError, match="reset"):
            recorder.scores()
        recorder.reset()
        linear(x).sum().backward()
        assert recorder.scores()["0"].shape == (3,)
    narrow(linear, 2)
    with pytest.raises(RuntimeError, match="while being recorded"):
        recorder.__enter__()
    assert "forward" not in linear.__dict__


def test_full_and_empty_widths() -> None:
    mlp = GatedMLP(8, 0, bias=True)
    x = torch.randn(2, 3, 8)
    with record_importance([mlp_group("mlp", mlp)]) as recorder:
        mlp(x).sum().backward()
    assert recorder.scores()["mlp"].shape == (0,)


def test_nested_recorders(model: Block, batch: torch.Tensor) -> None:
    truth = true_scores(model, batch)
    with record_importance(model) as recorder:
        with pytest.raises(RuntimeError, match="already being recorded"):
            record_importance([model.attn.q_proj]).__enter__()
        with pytest.raises(RuntimeError, match="already active"):
            recorder.__enter__()
        with record_importance([nn.Linear(2, 2)]):
            model.loss(batch).backward()
    assert_scores(recorder.scores(), truth)
    assert is_clean(model)


def test_targets_that_cannot_be_recorded(model: Block) -> None:
    with pytest.raises(ValueError, match="found in ReLU"):
        record_importance(nn.ReLU())
    with pytest.raises(TypeError, match="got int"):
        record_importance(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"target\['1'\] must be an nn.Linear, got ReLU"):
        record_importance([nn.Linear(2, 2), nn.ReLU()])
    with pytest.raises(ValueError, match="mode must be one of stream, exact, signed, second-order, got 'both'"):
        record_importance(model, mode="both")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float64"):
        record_importance(model.double())
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    with pytest.raises(ValueError, match="share one weight"):
        record_importance([first, second])
    group = mlp_group("same", GatedMLP(4, 4, bias=False))
    with pytest.raises(ValueError, match="names must be unique"):
        record_importance([group, group])


def test_grouped_query_attention_scores_q_and_o_only() -> None:
    attention = Attention(16, 4, 8, bias=False)
    attention.k_proj, attention.v_proj = nn.Linear(16, 8), nn.Linear(16, 8)
    (group,) = iter_groups(attention)
    assert [p.linear for p in group.projections] == [attention.q_proj, attention.o_proj]
    x = torch.randn(2, 16)
    with record_importance([group]) as recorder:
        (attention.o_proj(attention.q_proj(x)).sum() + attention.k_proj(x).sum()).backward()
    assert recorder.scores()[group.name].shape == (4,)
    assert attention.k_proj.weight.grad is not None
    assert attention.q_proj.weight.grad is None


def test_triton_backend_through_the_recorder(model: Block, batch: torch.Tensor) -> None:
    pytest.importorskip("triton")
    truth = true_scores(model, batch)
    with record_importance(model, backend="triton") as recorder:
        model.loss(batch).backward()
    assert_scores(recorder.scores(), truth)
