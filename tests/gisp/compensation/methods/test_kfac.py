"""K-FAC steps against their formula in float64, with gradients of single tokens by autograd."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from compensation_oracle import REMOVED, columns, divergence, kept_of, masked, projection, rows, weight_of
from recorder_oracle import grad_of
from tiny import FAMILIES, tiny_model, tiny_tokens

from gisp.compensation import Compensation, CompensationOptions, Step, compensate, fit_compensation
from gisp.compensation.acceptance import Measured
from gisp.compensation.methods import kfac
from gisp.compensation.methods.kfac import behind
from gisp.compensation.pruned import batch_sizes, predictions, student
from gisp.compensation.size_search import search
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.model.keep import Keep
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model

HELD_OUT = (1, 4, 7, 10)
HELD_OUT_TOKENS = 43


def fitted(model: Any, data: Sequences, removed: dict[str, torch.Tensor] | None = None, **options: Any) -> Compensation:
    kept = kept_of(model, REMOVED if removed is None else removed)
    return fit_compensation(map_model(model), Keep.of(kept), data, CompensationOptions(**options))


def steps_of(found: Compensation) -> tuple[Step, ...]:
    return found.results[-1].steps


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-bias", "qwen3"])
@pytest.mark.parametrize(("number", "refused", "panel"), [(1, None, 5), (2, None, 2560), (2, "a test says so", 5)])
def test_a_step_is_its_formula(
    family: str, number: int, refused: str | None, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Symmetric moments are made by panels of so many rows.
    monkeypatch.setattr(kfac, "_PANEL", panel)
    monkeypatch.setattr(kfac, "search", lambda measure, first, _, **__: (first, measure(first)))
    monkeypatch.setattr(student, "why_not", lambda *_: refused)
    model, data = tiny_model(family), rows()
    options: dict[str, Any] = {"damping": 0.2, "tokens": 40}
    found = fitted(model, data, method="kfac", steps=number, **options)
    # Rows 1, 4, 7 and 10 are held out; least squares takes 0, 2 and 3, a step the next four, one behind it the last and
    # the first two again.
    seen_by_step = (5, 6, 8, 9) if number == 1 else (11, 0, 2)
    taken, held_out = ([data.rows[i][0] for i in numbers] for numbers in (seen_by_step, HELD_OUT))
    start = fitted(model, data, method="lsq", **options)
    if number == 2:
        start = fitted(model, data, method="kfac", steps=1, **options)
    step = steps_of(found)[-1]
    assert len(steps_of(found)) == number and step.size > 0
    assert step.tokens == sum(len(ids) for ids in taken) == (50 if number == 1 else 44)
    dense, pruned = deepcopy(model).double(), masked(model, start)
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {update.name: [] for update in start.updates}
    for name, pairs in seen.items():

        def forward(_: Any, args: Any, output: torch.Tensor, pairs: Any = pairs) -> None:
            output.retain_grad()
            pairs.append((args[0].detach()[0], output))

        projection(pruned, name)[0].register_forward_hook(forward)
    divergence(dense, pruned, taken).backward()
    for old, new in zip(start.updates, found.updates, strict=True):
        linear, width = projection(pruned, old.name)
        cols = columns(kept_of(model, REMOVED)[old.name], width)
        x = torch.cat([inputs[:, cols] for inputs, _ in seen[old.name]])
        g = torch.cat([grad_of(output)[0] for _, output in seen[old.name]])
        a, b = x.T @ x / len(x), g.T @ g / len(g)
        for moments in (a, b):
            moments += 0.2 * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
        gradient = linear.weight.grad[:, cols] / len(x)
        wanted = -step.size * b.inverse() @ gradient @ a.inverse()
        change = weight_of(new).double() - weight_of(old).double()
        assert float(wanted.abs().max()) > 1e-4
        assert float((change - wanted).abs().max()) < 2e-3 * float(wanted.abs().max())
    before, after = (
        float(divergence(dense, masked(model, f), held_out).detach()) / HELD_OUT_TOKENS for f in (start, found)
    )
    assert step.before == pytest.approx(before, rel=1e-4)
    assert step.after == pytest.approx(after, rel=1e-4)


@pytest.mark.usefixtures("accept_all")
def test_steps_follow_each_other_through_the_data() -> None:
    model, data = tiny_model("llama-gqa"), rows()
    found = fitted(model, data, method="kfac", steps=3, tokens=40)
    fit, result = found.results
    # Rows 5, 6, 8 and 9, then 11, 0 and 2, then 3, 5 and 6.
    assert [step.tokens for step in result.steps] == [50, 44, 43] and result.tokens == 137
    assert result.steps[0].before == result.before == fit.after and result.steps[-1].after == result.after
    assert all(b.before == a.after for a, b in zip(result.steps, result.steps[1:], strict=False))
    assert all(step.after <= step.before for step in result.steps)
    again = fitted(model, data, method="kfac", steps=3, tokens=40)
    assert all(torch.equal(weight_of(a), weight_of(b)) for a, b in zip(found.updates, again.updates, strict=True))
    taken = sum(step.size > 0 for step in result.steps)
    assert found.describe() == (
        "lsq (target local, damping 0.5, size 1 in 4 of 4 blocks, 40 calibration tokens); "
        f"kfac (damping 0.5, {taken} of 3 steps taken, 137 calibration tokens); divergence from the dense model "
        f"{fit.before:.4g} to {result.after:.4g} nats a token on 43 held-out tokens of 4 texts"
    )


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_blocks_and_a_model_pruned_in_place(family: str) -> None:
    model, data = tiny_model(family), rows()
    removed = {**REMOVED, "layers.1.heads": torch.arange(4), "layers.2.channels": torch.arange(24)}
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wanted = fitted(model, data, removed, method="kfac", steps=2, tokens=64)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    shrinkable = ShrinkableModel(map_model(model))
    shrinkable.remove(removed)
    with torch.no_grad():
        plain = model(tiny_tokens(4, 16, seed=9)).logits
    found = compensate(model, data, method="kfac", steps=2, tokens=64)
    assert found.results == wanted.results
    with torch.no_grad():
        logits = model(tiny_tokens(4, 16, seed=9)).logits
    with torch.no_grad():
        expected = masked(tiny_model(family), wanted)(tiny_tokens(4, 16, seed=9)).logits
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert float((logits - plain).abs().max()) > 1e-3 * float(expected.abs().max())
    shrinkable.rollback(1)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@pytest.mark.usefixtures("accept_all")
def test_what_lost_nothing_stays_and_nothing_removed_is_no_error() -> None:
    model = tiny_model("llama-mha")
    found = fitted(model, rows(), {"layers.1.channels": torch.tensor([2])}, method="kfac", tokens=64)
    assert [update.name for update in found.updates] == ["layers.1.channels"]
    found = fitted(model, rows(), {}, method="kfac")
    assert found.updates == () and found.describe() == "kfac: nothing was removed, nothing is changed"


@pytest.mark.usefixtures("accept_all")
def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    whole = fitted(model, rows(), method="kfac", steps=2, tokens=64)
    monkeypatch.setattr(batch_sizes, "_TOKENS_PER_BATCH", 16)
    monkeypatch.setattr(predictions, "_LOGITS", {"cpu": 5 * 96})
    parts = fitted(model, rows(), method="kfac", steps=2, tokens=64)
    for a, b in zip(whole.updates, parts.updates, strict=True):
        assert torch.allclose(weight_of(a), weight_of(b), atol=1e-5 * float(weight_of(b).abs().max()))


def test_steps_go_round_the_rows() -> None:
    seen = rows((16,) * 3).rows
    assert behind(seen, 0, 17) == 2 and behind(seen, 2, 17) == 4 and behind(seen, 1, 1000) == 4


def test_bad_input() -> None:
    model = tiny_model("llama-mha")
    with pytest.raises(GispError, match="a compensation needs at least 4 calibration sequences"):
        fitted(model, rows((16,)), method="kfac")
    with pytest.raises(GispError, match="--compensation-steps is 0: give at least 1"):
        CompensationOptions(method="kfac", steps=0)


def test_weights_that_are_not_finite() -> None:
    model = tiny_model("llama-mha")
    with torch.no_grad():
        # Behind all blocks, so that least squares does not see it.
        model.lm_head.weight[3, 1] = math.inf
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(GispError, match="not finite"):
        fitted(model, rows(), method="kfac", tokens=64)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("calls", [1, 4, 9])
def test_the_dense_model_survives_an_interrupt(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    model = tiny_model("llama-gqa")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    states = student.Student._states
    left = [calls]

    def interrupted(self: Any, *args: Any) -> list[torch.Tensor]:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return states(self, *args)

    monkeypatch.setattr(student.Student, "_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(model, rows(), method="kfac", tokens=64)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_direction_that_is_not_finite_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    monkeypatch.setattr(kfac._Moments, "direction", lambda self, *_: (torch.full_like(self.cross, math.inf), 0.5))
    found = fitted(model, rows(), method="kfac", steps=2, tokens=64)
    start = fitted(model, rows(), method="lsq", tokens=64)
    assert [step.size for step in steps_of(found)] == [0, 0] and not found.results[-1].kept
    assert all(torch.equal(weight_of(a), weight_of(b)) for a, b in zip(found.updates, start.updates, strict=True))
    assert "dropped as nothing brought the model nearer" in found.describe()


@pytest.mark.usefixtures("accept_all")
def test_a_step_behind_one_that_failed_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = tiny_model("llama-gqa"), []

    def recorded(measure: Any, first: float, start: Measured, **_: float) -> tuple[float, Measured]:
        tried.append(first)
        return (0.0, start) if len(tried) == 1 else search(measure, first, start)

    monkeypatch.setattr(kfac, "search", recorded)
    found = fitted(model, rows(), method="kfac", steps=3, tokens=150, damping=2.0)
    first, second, third = steps_of(found)
    assert first.size == 0 and first.after == first.before == second.before
    assert tried[0] == tried[1] == 0.5 / len(found.updates) and tried[2] == (second.size or tried[0])
    assert second.after < second.before and third.after <= second.after


@pytest.mark.usefixtures("accept_all")
def test_raised_damping_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ridge = kfac.ridge
    monkeypatch.setattr(kfac, "ridge", lambda gram, cross, damping: (ridge(gram, cross, damping)[0], 10 * damping))
    found = fitted(tiny_model("llama-gqa"), rows(), method="kfac", steps=2, tokens=64, damping=0.25)
    assert [(step.damping, step.raised) for step in steps_of(found)] == [(2.5, 4), (2.5, 4)]
    assert "kfac (damping 0.25 (raised up to 2.5 in 4 blocks)," in found.describe()


def test_moments_without_a_factorisation_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add = kfac._Moments.add
    monkeypatch.setattr(kfac._Moments, "add", lambda self, inputs, gradients: add(self, inputs * math.nan, gradients))
    with pytest.raises(GispError, match=r"layers\.0\.channels cannot be compensated: no Cholesky factorisation"):
        fitted(model, rows(), method="kfac", tokens=64)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("target", ["local", "dense"])
def test_the_target_is_that_of_the_least_squares_it_starts_from(target: str) -> None:
    options: dict[str, Any] = {"tokens": 64, "target": target}
    start = fitted(tiny_model("llama-gqa"), rows(), method="lsq", **options)
    found = fitted(tiny_model("llama-gqa"), rows(), method="kfac", steps=1, **options)
    assert found.results[0] == start.results[0] and f"lsq (target {target}, " in found.describe()


def test_any_mode_of_the_caller() -> None:
    model = tiny_model("llama-gqa")
    wanted = fitted(model, rows(), method="kfac", steps=1, tokens=64)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = fitted(model, rows(), method="kfac", steps=1, tokens=64)
        assert found.results == wanted.results
        assert all(torch.equal(weight_of(a), weight_of(b)) for a, b in zip(found.updates, wanted.updates, strict=True))


def test_tokens_a_model_rules_out() -> None:
    class Head(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            out = super().forward(states)
            ruled_out = torch.zeros(out.shape[-1], dtype=torch.bool)
            ruled_out[90:] = True
            return out.masked_fill(ruled_out, -math.inf)

    model = tiny_model("llama-gqa")
    head = Head(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    (step,) = steps_of(fitted(model, rows(), method="kfac", steps=1, tokens=150, damping=2.0))
    assert 0 < step.after < step.before
