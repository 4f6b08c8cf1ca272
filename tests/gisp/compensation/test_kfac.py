"""K-FAC steps against their formula in float64, with gradients of single tokens by autograd."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from compensation_oracle import REMOVED, columns, kept_of, projection, weight_of
from recorder_oracle import grad_of
from tiny import FAMILIES, VOCAB, tiny_model, tiny_tokens

from gisp.compensation import Compensation, CompensationOptions, compensate, fit_compensation
from gisp.compensation import kfac as module
from gisp.compensation.held_out import hold_out
from gisp.compensation.kfac import _batches, _behind, _search
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.model.keep import Keep
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model

LENGTHS = (16, 9, 12, 16, 5, 16, 11, 16, 7, 16, 13, 16)
HELD_OUT = (1, 6, 10)


def rows(lengths: tuple[int, ...] = LENGTHS) -> Sequences:
    """Rows of different lengths: batches of them are padded."""
    ids = tiny_tokens(len(lengths), max(lengths), seed=5)
    return Sequences.plain([(row[:n], row[:n].clone()) for row, n in zip(ids, lengths, strict=True)])


def fitted(model: Any, data: Sequences, removed: dict[str, torch.Tensor] | None = None, **options: Any) -> Compensation:
    kept = kept_of(model, REMOVED if removed is None else removed)
    return fit_compensation(map_model(model), Keep.of(kept), data, CompensationOptions(**options))


def masked(model: Any, found: Compensation) -> Any:
    """A float64 copy with the compensated weights; the removed columns are zero."""
    copy = deepcopy(model).double()
    for update in found.updates:
        linear, _ = projection(copy, update.name)
        with torch.no_grad():
            linear.weight.zero_()
            linear.weight[:, update.columns] = weight_of(update).double()
    return copy


def divergence(dense: Any, pruned: Any, data: list[torch.Tensor]) -> torch.Tensor:
    """Sum over tokens, each row alone."""
    total = torch.zeros((), dtype=torch.float64)
    for ids in data:
        with torch.no_grad():
            wanted = dense(ids[None]).logits.softmax(-1)
        total = total + (wanted * (wanted.log() - pruned(ids[None]).logits.log_softmax(-1))).sum()
    return total


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-bias", "qwen3"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_step_is_its_formula(family: str, number: int) -> None:
    model, data = tiny_model(family), rows()
    options: dict[str, Any] = {"damping": 0.2, "tokens": 40}
    found = fitted(model, data, method="kfac", steps=number, **options)
    # Rows 1, 6 and 10 are held out; least squares takes 0, 2 and 3, a step the next four, one behind it two and the
    # first again.
    seen_by_step = (4, 5, 7, 8) if number == 1 else (9, 11, 0)
    taken, held_out = ([data.rows[i][0] for i in numbers] for numbers in (seen_by_step, HELD_OUT))
    start = fitted(model, hold_out(data)[0], method="lsq", **options)
    if number == 2:
        start = fitted(model, data, method="kfac", steps=1, **options)
    step = found.steps[-1]
    assert len(found.steps) == number and step.size > 0
    assert step.tokens == sum(len(ids) for ids in taken) == (44 if number == 1 else 48)
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
    before, after = (float(divergence(dense, masked(model, f), held_out).detach()) / 33 for f in (start, found))
    assert step.before == pytest.approx(before, rel=1e-4)
    assert step.after == pytest.approx(after, rel=1e-4)
    assert step.after < step.before


def test_steps_follow_each_other_through_the_data() -> None:
    model, data = tiny_model("llama-gqa"), rows()
    found = fitted(model, data, method="kfac", steps=3, tokens=40)
    # Rows 4, 5, 7 and 8, then 9, 11 and 0, then 2 to 5.
    assert [step.tokens for step in found.steps] == [44, 48, 49]
    assert all(b.before == a.after for a, b in zip(found.steps, found.steps[1:], strict=False))
    assert all(step.after <= step.before for step in found.steps)
    again = fitted(model, data, method="kfac", steps=3, tokens=40)
    assert all(torch.equal(weight_of(a), weight_of(b)) for a, b in zip(found.updates, again.updates, strict=True))
    described, taken = found.describe(), sum(step.size > 0 for step in found.steps)
    fell = f"divergence from the dense model {found.steps[0].before:.3g} to {found.steps[-1].after:.3g} nats a token"
    assert (
        described == f"kfac, target dense, damping 0.5, {taken} of 3 steps taken ({fell}), 40 + 141 calibration tokens"
    )


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
    assert found.steps == wanted.steps
    with torch.no_grad():
        logits = model(tiny_tokens(4, 16, seed=9)).logits
    with torch.no_grad():
        expected = masked(tiny_model(family), wanted)(tiny_tokens(4, 16, seed=9)).logits
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert float((logits - plain).abs().max()) > 1e-3 * float(expected.abs().max())
    shrinkable.rollback(1)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_what_lost_nothing_stays_and_nothing_removed_is_no_error() -> None:
    model = tiny_model("llama-mha")
    found = fitted(model, rows(), {"layers.1.channels": torch.tensor([2])}, method="kfac", tokens=64)
    assert [update.name for update in found.updates] == ["layers.1.channels"]
    assert fitted(model, rows(), {}, method="kfac").updates == ()


def test_updates_it_starts_from_stay_as_they_are() -> None:
    model, data = tiny_model("llama-gqa"), rows()
    data, held_out = hold_out(data)
    start = list(fitted(model, data, method="lsq", tokens=64).updates)
    weights = [weight_of(update).clone() for update in start]
    options = CompensationOptions(method="kfac", steps=1, tokens=64)
    moved, steps = module.kfac_updates(map_model(model), start, data, held_out, options)
    assert steps[0].size > 0
    for old, new, weight in zip(start, moved, weights, strict=True):
        assert torch.equal(weight_of(old), weight) and not torch.equal(weight_of(new), weight)


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    whole = fitted(model, rows(), method="kfac", steps=2, tokens=64)
    monkeypatch.setattr(module, "_TOKENS_PER_BATCH", 16)
    parts = fitted(model, rows(), method="kfac", steps=2, tokens=64)
    for a, b in zip(whole.updates, parts.updates, strict=True):
        assert torch.allclose(weight_of(a), weight_of(b), atol=1e-5 * float(weight_of(b).abs().max()))


@pytest.mark.parametrize("room", [0, 16 * VOCAB * 4])
def test_room_for_logits_does_not_matter(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    model = tiny_model("llama-gqa")
    monkeypatch.setattr(module, "_TOKENS_PER_BATCH", 16)
    kept = fitted(model, rows(), method="kfac", steps=2, tokens=64)
    monkeypatch.setattr(module, "_LOGITS_BYTES", room)
    batches = _batches(map_model(model), rows().rows)
    held = [logits is not None for _, logits in module._Student(map_model(model), []).beside_dense(batches)]
    # Rows of 16 tokens come first, each a batch of its own.
    assert held == [room > 0] + [False] * (len(batches) - 1)
    anew = fitted(model, rows(), method="kfac", steps=2, tokens=64)
    assert kept.steps == anew.steps
    assert all(torch.equal(weight_of(a), weight_of(b)) for a, b in zip(kept.updates, anew.updates, strict=True))


def test_steps_go_round_the_rows() -> None:
    seen = rows((16,) * 3).rows
    assert _behind(seen, 0, 17) == 2 and _behind(seen, 2, 17) == 4 and _behind(seen, 1, 1000) == 4


@pytest.mark.parametrize(
    ("lowest", "first", "wanted"),
    [(1.0, 1.0, 1.0), (1.0, 0.3, 1.0125), (1.0, 1.6, 1.6 / 1.5), (1.0, 8.0, 1.0), (1e-9, 1.0, 0.0)],
)
def test_the_search_for_a_size(lowest: float, first: float, wanted: float) -> None:
    tried = []

    def value(size: float) -> float:
        tried.append(size)
        return (size - lowest) ** 2 if size < 3 else math.nan

    size, after = _search(value, first, lowest**2)
    assert size == pytest.approx(wanted)
    assert after == ((size - lowest) ** 2 if size else lowest**2)
    assert len(tried) == len(set(tried)) <= 12


def test_bad_input() -> None:
    model = tiny_model("llama-mha")
    with pytest.raises(GispError, match="kfac needs at least 2 calibration sequences"):
        fitted(model, rows((16,)), method="kfac")
    for options, message in (
        ({"steps": 0}, "--compensation-steps is 0: give at least 1"),
        ({"intercept": True}, "--compensate kfac fits no output biases"),
    ):
        with pytest.raises(GispError, match=message):
            CompensationOptions(method="kfac", **options)


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
    logits = module._Student._logits
    left = [calls]

    def interrupted(self: Any, batch: Any) -> torch.Tensor:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return logits(self, batch)

    monkeypatch.setattr(module._Student, "_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(model, rows(), method="kfac", tokens=64)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_direction_that_is_not_finite_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    monkeypatch.setattr(module._Moments, "direction", lambda self, *_: (torch.full_like(self.cross, math.inf), 0.5))
    found = fitted(model, rows(), method="kfac", steps=2, tokens=64)
    start = fitted(model, hold_out(rows())[0], method="lsq", tokens=64)
    assert [step.size for step in found.steps] == [0, 0]
    assert all(torch.equal(weight_of(a), weight_of(b)) for a, b in zip(found.updates, start.updates, strict=True))
    assert "0 of 2 steps taken" in found.describe()


def test_a_step_behind_one_that_failed_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried, search = tiny_model("llama-gqa"), [], module._search

    def recorded(value: Any, first: float, before: float) -> tuple[float, float]:
        tried.append(first)
        return (0.0, before) if len(tried) == 1 else search(value, first, before)

    monkeypatch.setattr(module, "_search", recorded)
    found = fitted(model, rows(), method="kfac", steps=3, tokens=64)
    first, second, third = found.steps
    assert first.size == 0 and first.after == first.before == second.before
    assert tried[0] == tried[1] == 0.5 / len(found.updates) and tried[2] == (second.size or tried[0])
    assert second.after < second.before and third.after <= second.after


def test_raised_damping_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ridge = module.ridge
    monkeypatch.setattr(module, "ridge", lambda gram, cross, damping: (ridge(gram, cross, damping)[0], 10 * damping))
    found = fitted(tiny_model("llama-gqa"), rows(), method="kfac", steps=2, tokens=64, damping=0.25)
    assert [(step.damping, step.raised) for step in found.steps] == [(2.5, 4), (2.5, 4)]
    assert "damping 0.25 (in steps raised up to 2.5 in 4 blocks)," in found.describe()


def test_moments_without_a_factorisation_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add = module._Moments.add
    monkeypatch.setattr(module._Moments, "add", lambda self, inputs, gradients: add(self, inputs * math.nan, gradients))
    with pytest.raises(GispError, match=r"layers\.0\.channels cannot be compensated: no Cholesky factorisation"):
        fitted(model, rows(), method="kfac", tokens=64)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("target", ["local", "dense"])
def test_the_target_is_that_of_the_least_squares_it_starts_from(target: str) -> None:
    model, data = tiny_model("llama-gqa"), rows()
    start = fitted(model, hold_out(data)[0], method="lsq", tokens=64, target=target)
    found = fitted(model, data, method="kfac", steps=1, tokens=64, target=target)
    assert f"kfac, target {target}, " in found.describe()
    assert [(u.before, u.after) for u in found.updates] == [(u.before, u.after) for u in start.updates]
    held_out = [data.rows[i][0] for i in HELD_OUT]
    apart = float(divergence(deepcopy(model).double(), masked(model, start), held_out).detach()) / 33
    assert found.steps[0].before == pytest.approx(apart, rel=1e-4)


def test_any_mode_of_the_caller() -> None:
    model = tiny_model("llama-gqa")
    wanted = fitted(model, rows(), method="kfac", steps=1, tokens=64)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = fitted(model, rows(), method="kfac", steps=1, tokens=64)
        assert found.steps == wanted.steps
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
    (step,) = fitted(model, rows(), method="kfac", steps=1, tokens=64).steps
    assert 0 < step.after < step.before
