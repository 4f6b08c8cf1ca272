"""``gisp.fuse``: the same model, its norms and MLPs run by the kernels of the pruning pass."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_tokens
from torch import nn

import gisp
from gisp.errors import GispError
from gisp.model.fuse import FusedMLP, FusedRMSNorm


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_names_stay(family):
    model = tiny_model(family)
    plain = copy.deepcopy(model)
    assert gisp.fuse(model) is model
    layers = model.config.num_hidden_layers
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(FusedMLP) == layers
    assert kinds.count(FusedRMSNorm) == 2 * layers + 1 + (2 * layers if family == "qwen3" else 0)
    assert model.state_dict().keys() == plain.state_dict().keys()
    ids = tiny_tokens(3, 11)
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=1e-5, atol=1e-5)


def test_the_fused_ops_run(monkeypatch):
    calls: list[str] = []

    def spy(name):
        op = getattr(gisp.model.fuse, name)

        def call(*args):
            calls.append(name)
            return op(*args)

        return call

    for name in ("add_rms_norm", "swiglu"):
        monkeypatch.setattr(gisp.model.fuse, name, spy(name))
    model = gisp.fuse(tiny_model())
    calls.clear()
    logits(model, tiny_tokens(1, 4))
    assert calls.count("add_rms_norm") == 2 * 4 + 1 and calls.count("swiglu") == 4


def test_gradients_are_those_of_the_plain_model():
    model = tiny_model("qwen3")
    plain = copy.deepcopy(model)
    gisp.fuse(model)
    ids = tiny_tokens(2, 8)
    for each in (model, plain):
        each(input_ids=ids, labels=ids).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_pruned_in_place_and_generating():
    model = gisp.fuse(tiny_model("llama-gqa"))
    trajectory = gisp.prune(model, tiny_tokens(), sparsity=0.4, steps=4, align=1, batch_tokens=64)
    fused = model.generate(tiny_tokens(1, 5), max_new_tokens=6, do_sample=False)
    plain = tiny_model("llama-gqa")
    trajectory.at(0.4, plain)
    assert torch.equal(fused, plain.generate(tiny_tokens(1, 5), max_new_tokens=6, do_sample=False))


def test_other_norms_and_activations_are_left_alone():
    class ShiftedNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.variance_epsilon = 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)

    model = tiny_model(hidden_act="gelu")
    model.shifted = ShiftedNorm()
    gisp.fuse(model)
    assert isinstance(model.shifted, ShiftedNorm)
    assert not any(isinstance(module, FusedMLP) for module in model.modules())
    with pytest.raises(GispError, match="'x' is no model"):
        gisp.fuse("x")
    with pytest.raises(GispError, match="nothing to fuse"):
        gisp.fuse(nn.Sequential(nn.Linear(2, 2)))
    gisp.fuse(model)
