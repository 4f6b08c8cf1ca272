"""Weights that are tied, computed, copied, hooked, offloaded, or scored with a scaled loss: right or refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder_oracle import Block, assert_scores, grad_of, true_scores
from torch import nn

from gisp_kernels import record_activations, record_importance, record_lines
from gisp_kernels.record.targets import Mode

MODES: tuple[Mode, ...] = ("stream", "exact")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed(ids).tanh()).pow(2).mean()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_tied_weights_are_summed_or_refused(mode: Mode, power: int) -> None:
    model, ids = Tied(), torch.tensor([[1, 2, 3, 3]])
    model(ids).backward()
    weight = model.lm_head.weight
    truth = ((weight * grad_of(weight)).abs() ** power).sum(1).double().detach()
    for keep_grad in (False, True):
        recorder = record_importance({"head": model.lm_head}, mode=mode, power=power, keep_grad=keep_grad)
        if mode == "stream" and not keep_grad:
            with (
                recorder,
                pytest.raises(RuntimeError, match="one backward pass uses a weight in its layer and"),
            ):
                model(ids).backward()
        else:
            with recorder:
                model(ids).backward()
            torch.testing.assert_close(recorder.scores()["head"].double(), truth, rtol=1e-5, atol=0.0)


def test_tied_weights_inside_a_model_are_found() -> None:
    model = nn.ModuleDict({"block": Block(), "other": nn.Linear(16, 21)})
    model["other"].weight = model["block"].mlp.up_proj.weight  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"a weight of group 'block.mlp' is 'other.weight' too"):
        record_importance(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"is 'other.weight' too"):
        record_importance(model, keep_grad=True)
    model.requires_grad_(True)
    record_importance(model, keep_grad=True)
    record_importance(model, mode="exact")
    assert "lm_head.row" not in record_lines(nn.Sequential(Tied(), nn.Linear(2, 2))).scores()


def test_two_layers_with_one_weight_score_its_whole_gradient() -> None:
    one, two, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(5, 4)
    two.weight = one.weight
    two(one(x).tanh()).pow(2).sum().backward()
    truth = (one.weight * grad_of(one.weight)).abs().sum(1).detach()
    with record_importance([one, two], keep_grad=True) as recorder:
        two(one(x).tanh()).pow(2).sum().backward()
    for scores in recorder.scores().values():
        torch.testing.assert_close(scores, truth)


@pytest.mark.parametrize("old", [False, True], ids=["parametrized", "recomputed"])
def test_weight_norm(old: bool) -> None:
    norm: Callable[[nn.Linear], Any] = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    one, two, x = norm(nn.Linear(6, 5)), norm(nn.Linear(5, 4)), torch.randn(7, 6)
    with record_importance({"a": one, "b": two}) as recorder:
        two(one(x).tanh()).pow(2).sum().backward()
    plain = {"a": nn.Linear(6, 5), "b": nn.Linear(5, 4)}
    for linear, normed in zip(plain.values(), (one, two), strict=True):
        linear.weight.data.copy_(normed.weight)
        linear.bias.data.copy_(normed.bias)
    plain["b"](plain["a"](x).tanh()).pow(2).sum().backward()
    for name, linear in plain.items():
        expected = (linear.weight * grad_of(linear.weight)).abs().sum(1).detach()
        torch.testing.assert_close(recorder.scores()[name], expected)
    with pytest.raises(TypeError, match="is computed from other parameters"):
        record_importance({"a": one}, keep_grad=True)


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "save"])
def test_copies_inside_the_context_are_refused(model: Block, batch: torch.Tensor, kind: str) -> None:
    model.wrap = nn.Module.__call__
    made: dict[str, Callable[[Any], object]] = {
        "deepcopy": copy.deepcopy,
        "pickle": pickle.dumps,
        "save": lambda module: torch.save(module, io.BytesIO()),
    }
    for context in (record_importance(model), record_activations([model.mlp.up_proj])):
        with context, pytest.raises(RuntimeError, match="cannot be copied or pickled while it is being recorded"):
            made[kind](model)
    made[kind](model)
    with record_importance(model) as recorder:
        torch.save(model.state_dict(), io.BytesIO())
        model.loss(batch).backward()
    assert_scores(recorder.scores(), true_scores(model, batch))


def test_a_copy_beside_kept_gradients_is_not_recorded(model: Block, batch: torch.Tensor) -> None:
    with record_importance(model, keep_grad=True) as recorder:
        model.wrap = nn.Module.__call__
        with pytest.raises(RuntimeError, match="cannot be copied or pickled"):
            pickle.dumps(model)
        average = copy.deepcopy(model)
        average.loss(batch).backward()
        assert recorder.backward_calls == 0
        model.loss(batch).backward()
    assert_scores(recorder.scores(), true_scores(model, batch))
    average.loss(batch).backward()
    assert recorder.backward_calls == 1


def test_hooked_modules(model: Block, batch: torch.Tensor) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    truth = true_scores(model, batch)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.add_hook_to_module(module, hooks.ModelHook())
    for keep_grad in (False, True):
        with record_importance(model, keep_grad=keep_grad) as recorder:
            model.loss(batch).backward()
        assert_scores(recorder.scores(), truth)
        assert (model.mlp.up_proj.weight.grad is not None) == keep_grad
    model.zero_grad()
    model.requires_grad_(False)
    for keep_grad in (False, True):
        with record_importance(model, keep_grad=keep_grad) as recorder:
            model.loss(batch).backward()
        assert_scores(recorder.scores(), truth)
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_offloaded_weights_are_refused(model: Block) -> None:
    model.mlp.up_proj.to("meta")
    with pytest.raises(TypeError, match="cannot be recorded while it is offloaded"):
        record_importance(model)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep_grad", [False, True])
def test_loss_scale_is_undone(model: Block, mode: Mode, power: int, keep_grad: bool) -> None:
    batches = torch.randn(3, 2, 7, 16)
    with record_importance(model, mode=mode, power=power) as plain:
        for batch in batches:
            model.loss(batch).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.zero_grad()
    with record_importance(model, mode=mode, power=power, keep_grad=keep_grad, loss_scale=scaler) as recorder:
        for batch in batches:
            scaler.scale(model.loss(batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            if mode == "stream":
                optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**13
    for name, expected in plain.scores().items():
        torch.testing.assert_close(recorder.scores()[name], expected, rtol=1e-6, atol=0.0)


def test_a_scale_must_be_told_and_must_hold(model: Block, batch: torch.Tensor) -> None:
    for keep_grad in (False, True):
        with (
            record_importance(model, keep_grad=keep_grad),
            torch.autocast("cpu", dtype=torch.float16),
            pytest.raises(RuntimeError, match=r"pass loss_scale=scaler, or loss_scale=1\.0"),
        ):
            model(batch)
    with record_importance(model, loss_scale=1.0) as recorder, torch.autocast("cpu", dtype=torch.float16):
        model.loss(batch).backward()
    assert_scores(recorder.scores(), true_scores(model, batch), rtol=5e-2)
    with record_importance(model, loss_scale=8.0) as recorder:
        (model.loss(batch) * float("inf")).backward()
    with pytest.raises(RuntimeError, match="the scaled loss overflowed"):
        recorder.scores()
    with record_importance(model, loss_scale=0.0), pytest.raises(RuntimeError, match="finite and above 0, got 0"):
        model.loss(batch).backward()
    with pytest.raises(ValueError, match="does not undo loss_scale"):
        record_importance(model, mode="second-order", loss_scale=8.0)
