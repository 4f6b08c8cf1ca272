"""Gates and weights trained towards the dense model, against float64 autograd of the same parameters."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from compensation_oracle import REMOVED, columns, divergence, kept_of, masked, projection, rows, weight_of
from tiny import FAMILIES, tiny_model

from gisp.compensation import Compensation, CompensationOptions, fit_compensation, fold_into_dense
from gisp.compensation.acceptance import Measured
from gisp.compensation.methods.train import _steps, rate
from gisp.compensation.pruned import batch_sizes, predictions
from gisp.compensation.pruned.projections import Traced
from gisp.compensation.pruned.student import Student
from gisp.data import Sequences
from gisp.model.keep import Keep
from gisp.model.modes import frozen
from gisp.model.structures import map_model

EMPTY = {**REMOVED, "layers.1.heads": torch.arange(4), "layers.2.channels": torch.arange(24)}
MANY = Sequences.plain([row for _ in range(4) for row in rows().rows])


def fitted(model: Any, data: Sequences, removed: dict[str, torch.Tensor] | None = None, **options: Any) -> Compensation:
    kept = kept_of(model, REMOVED if removed is None else removed)
    return fit_compensation(map_model(model), Keep.of(kept), data, CompensationOptions(**options))


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-bias", "qwen3"])
def test_gradients_are_those_of_a_factor_on_the_inputs(family: str) -> None:
    model, data = tiny_model(family), rows()
    kept = kept_of(model, REMOVED)
    pruned = Student(map_model(model), Keep.of(kept))
    generator = torch.Generator().manual_seed(2)
    gates = [
        (0.5 + torch.rand(len(p.columns) // p.block, generator=generator)).requires_grad_() for p in pruned.projections
    ]
    weights = [(1.1 * p.weight).requires_grad_() for p in pruned.projections]
    tokens = sum(len(ids) for ids, _ in data.rows)
    with frozen(model):
        pruned.backward(data.rows, [Traced(w, g) for w, g in zip(weights, gates, strict=True)], 1 / tokens)
    dense, other = deepcopy(model).double(), deepcopy(model).double()
    factors = {}
    for place, gate, weight in zip(pruned.projections, gates, weights, strict=True):
        linear, width = projection(other, place.name)
        cols = columns(kept[place.name], width)
        with torch.no_grad():
            linear.weight.zero_()
            linear.weight[:, cols] = weight.double()
        factor = gate.detach().double().requires_grad_()
        factors[place.name] = factor

        def scale(_: Any, args: Any, factor: Any = factor, cols: Any = cols, width: int = width) -> Any:
            return (
                torch.zeros_like(args[0]).index_copy(-1, cols, args[0][..., cols] * factor.repeat_interleave(width)),
            )

        linear.register_forward_pre_hook(scale)
    (divergence(dense, other, [ids for ids, _ in data.rows]) / tokens).backward()
    for place, gate, weight in zip(pruned.projections, gates, weights, strict=True):
        linear, width = projection(other, place.name)
        cols = columns(kept[place.name], width)
        for found, wanted in ((gate.grad, factors[place.name].grad), (weight.grad, linear.weight.grad[:, cols])):
            assert found is not None and wanted is not None and float(wanted.abs().max()) > 1e-4
            assert float((found.double() - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["gates", "distil"])
def test_training_lowers_the_divergence(family: str, method: str) -> None:
    model = tiny_model(family)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = fitted(model, MANY, method=method, steps=20, batch_tokens=128)
    (result,) = found.results
    assert result.kept and result.after < 0.98 * result.before
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    for update in found.updates:
        linear, width = projection(model, update.name)
        ratio = weight_of(update) / linear.weight.detach()[:, update.columns]
        by_structure = ratio.view(len(ratio), -1, width).permute(1, 0, 2).flatten(1)
        spread = float((by_structure.amax(1) - by_structure.amin(1)).max())
        # A gate is one factor for all elements of its structure.
        assert (spread < 1e-4) == (method == "gates")
        assert float((by_structure - 1).abs().max()) > 1e-3


def test_the_divergence_told_is_that_of_the_weights() -> None:
    model = tiny_model("llama-gqa")
    found = fitted(model, rows(), method="gates", steps=10, batch_tokens=64)
    assert found.results[0].kept
    held_out = [rows().rows[number][0] for number in (1, 4, 7, 10)]
    apart = float(divergence(deepcopy(model).double(), masked(model, found), held_out).detach()) / 43
    assert found.results[0].after == pytest.approx(apart, rel=1e-4)
    assert found.describe().startswith(f"gates (learning rate 0.01, best after {found.results[0].count} of 10 steps, ")


@pytest.mark.parametrize("method", ["gates", "distil"])
def test_batches_do_not_matter_and_runs_repeat(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    options: dict[str, Any] = {"method": method, "steps": 4, "batch_tokens": 100}
    model = tiny_model("llama-gqa")
    whole, again = (fitted(model, MANY, EMPTY, **options) for _ in range(2))
    assert whole.results == again.results
    assert all(torch.equal(weight_of(a), weight_of(b)) for a, b in zip(whole.updates, again.updates, strict=True))
    monkeypatch.setattr(batch_sizes, "_TOKENS_PER_BATCH", 16)
    monkeypatch.setattr(predictions, "_LOGITS", {"cpu": 5 * 96})
    parts = fitted(model, MANY, EMPTY, **options)
    for a, b in zip(whole.updates, parts.updates, strict=True):
        assert torch.allclose(weight_of(a), weight_of(b), atol=1e-4 * float(weight_of(b).abs().max()))


@pytest.mark.parametrize("method", ["gates", "distil"])
def test_a_rate_that_destroys_leaves_what_was_there(method: str) -> None:
    model = tiny_model("llama-gqa")
    found = fitted(model, rows(), method=f"lsq+{method}", steps=3, learning_rate=1e4, tokens=64)
    start = fitted(model, rows(), method="lsq", tokens=64)
    assert not found.results[1].kept and found.results[0] == start.results[0]
    assert all(torch.equal(weight_of(a), weight_of(b)) for a, b in zip(found.updates, start.updates, strict=True))
    assert f"{method} (learning rate 10000, " in found.describe() and "dropped as" in found.describe()


def test_the_rate_rises_and_falls_to_nothing() -> None:
    for steps in (1, 3, 40, 150):
        rates = [rate(step, steps) for step in range(steps)]
        top = rates.index(max(rates))
        assert max(rates) == 1 and min(rates) > 0 and top == min(10, steps // 4)
        assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rate(149, 150) < 0.001


def test_steps_go_through_all_rows_before_any_comes_again() -> None:
    data = rows((4,) * 6).rows
    steps = _steps(data, 8)
    first, second = ([ids for _ in range(3) for ids, _ in next(steps)] for _ in range(2))
    for round_ in (first, second):
        assert sorted(map(id, round_)) == sorted(id(ids) for ids, _ in data)
    assert list(map(id, first)) != list(map(id, second))
    # A step sees no row twice, however many tokens it asks for.
    assert len(next(_steps(data, 1000))) == 6


def test_infinite_losses_end_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model("llama-gqa"), []
    plain = Student.measure

    def measured(self: Any, *args: Any) -> Measured:
        calls.append(1)
        found = plain(self, *args)
        return replace(found, divergences=found.divergences * math.nan)

    monkeypatch.setattr(Student, "measure", measured)
    found = fitted(model, rows(), method="gates", steps=30, batch_tokens=32)
    assert len(calls) == 1 and found.updates == ()


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("method", ["gates", "gates+bias", "bias+gates"])
def test_gates_alone_are_told_as_factors(method: str) -> None:
    model = tiny_model("llama-gqa").bfloat16()
    done = fitted(model, MANY, method=method, batch_tokens=64, steps=4)
    assert len(done.updates) == len(REMOVED)
    for update in done.updates:
        linear, width = projection(model, update.name)
        assert update.factors is not None
        own = linear.weight[:, update.columns].float() * update.factors.repeat_interleave(width)
        assert not torch.equal(update.factors, torch.ones_like(update.factors))
        assert torch.equal(own.bfloat16(), weight_of(update))


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("method", ["lsq", "lsq+gates", "gates+lsq", "gates+gates", "distil", "gates+kfac"])
def test_other_weights_are_not_told_as_factors(method: str) -> None:
    few: dict[str, Any] = {} if method == "lsq" else {"batch_tokens": 64} | ({} if "kfac" in method else {"steps": 4})
    done = fitted(tiny_model("llama-gqa"), MANY, method=method, **few)
    assert len(done.updates) == len(REMOVED)
    assert all(update.factors is None for update in done.updates)


@pytest.mark.usefixtures("accept_all")
def test_a_bias_alone_leaves_the_weights_to_the_model() -> None:
    done = fitted(tiny_model("llama-gqa"), MANY, method="bias")
    assert len(done.updates) == len(REMOVED)
    assert all(update.weight is None and update.bias is not None for update in done.updates)


@pytest.mark.usefixtures("accept_all")
def test_factors_multiply_weights_of_a_wider_dtype_than_they_were_fitted_in() -> None:
    model = tiny_model("llama-gqa")
    done = fitted(deepcopy(model).bfloat16(), MANY, method="gates", batch_tokens=64, steps=4)
    folded = deepcopy(model)
    fold_into_dense(map_model(folded), done)
    for update in done.updates:
        assert update.factors is not None
        (own, width), (found, _) = projection(model, update.name), projection(folded, update.name)
        wanted = own.weight[:, update.columns] * update.factors.repeat_interleave(width)
        assert torch.equal(found.weight[:, update.columns], wanted)
