"""The first-order term of second-order scores: how far noise shrinks it, and in which runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from score_cases import gradient_scorer, live, ragged
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.model.structures import map_model
from gisp.score import gradient as module
from gisp.score.first_order import averaged_batches, first_order_weights, shrinkage
from gisp.score.fused import ImportancePass, MicroBatch
from gisp_kernels import gate_sums


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_first_order_term_is_shrunk_to_the_best_estimate(strength):
    """Of factors on measured gradients the one with the least error, for any part of signal in them."""
    generator = torch.Generator().manual_seed(0)
    sequences, count, batches = 16, 160_000, 4
    scale = torch.rand(count, generator=generator) + 0.5
    true = strength * scale * torch.randn(count, generator=generator)
    measured, factors = torch.zeros(count), []
    for _ in range(batches):
        noise = sequences**0.5 * scale * torch.randn(sequences, count, generator=generator)
        grads = (true + noise) / sequences
        measured += grads.sum(0) / batches
        factors.append(float(shrinkage([gate_sums(grads, torch.ones(sequences))], sequences, batches)))
    units = (measured / scale, true / scale)
    best = float((units[0] * units[1]).mean() / units[0].square().mean())
    assert factors == pytest.approx([best] * batches, abs=0.05)
    assert best == pytest.approx(strength**2 / (strength**2 + 1 / batches), abs=0.02)


def test_kinds_are_judged_apart_and_zeros_say_nothing():
    still = torch.zeros(3, 5, dtype=torch.float64)
    strong = torch.tensor([[4.0, -4.0], [9.0, 9.0], [4.0, 4.0]], dtype=torch.float64)
    sums = {"layers.0.heads": still, "layers.1.heads": still, "layers.0.channels": strong}
    kinds: Any = {name: name.split(".")[-1] for name in sums}
    found = first_order_weights(sums, kinds, 8, 2.0)
    assert {name: float(value) for name, value in found.items()} == {
        "layers.0.heads": 0.0,
        "layers.1.heads": 0.0,
        "layers.0.channels": pytest.approx(6 / 6.5),
    }


def test_batches_in_a_moving_average():
    for ema in (0.0, 0.5, 0.9):
        for step in (1, 2, 30):
            weights = [(1 - ema) * ema**i for i in range(step)]
            expected = sum(weights) ** 2 / sum(weight**2 for weight in weights)
            assert averaged_batches(ema, step) == pytest.approx(expected)
    assert averaged_batches(0.9, 1000) == pytest.approx(19)


def test_shrunk_scores_lie_between_curvature_and_the_whole():
    model = tiny_model()
    # One token follows everything: all sequences agree on most gates.
    data = Sequences.plain([(ids, torch.full_like(ids, 7)) for ids, _ in ragged().rows])
    model_map = map_model(model)
    options: dict[str, Any] = {
        "engine": "exact",
        "batch_size": 2,
        "batch_tokens": 8192,
        "seed": 0,
        "criterion": "second-order",
    }
    plain = gradient_scorer(model_map, data, **options).score(1, model_map.groups).scores
    shrunk = gradient_scorer(model_map, data, first_order="shrunk", **options).score(1, model_map.groups).scores
    weights = [1 / len(data)] * len(data)
    sums = ImportancePass(model_map).gate_sums(
        [MicroBatch(*data.batch(list(range(len(data)))), weights)], live(model_map)
    )[0][0]
    factors = first_order_weights(sums, {group.name: group.kind for group in model_map.groups}, len(data), 1.0)
    assert 0 < float(factors["layers.0.channels"]) < 1
    for name, values in sums.items():
        expected = values[1] / 2 - factors[name] * values[0]
        torch.testing.assert_close(shrunk[name].double(), expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(shrunk[name], plain[name])
    signed = Sequences(data.rows, (1, -1, -1, 1, -1), ((0, 1, 2), (3, 4)))
    margin = [
        gradient_scorer(model_map, signed, first_order=s, **options).score(1, model_map.groups).scores
        for s in ("shrunk", "plain")
    ]
    assert all(torch.equal(margin[0][name], margin[1][name]) for name in margin[0])


def test_only_second_order_scores_have_a_first_order_term():
    with pytest.raises(GispError, match="--first-order shrunk belongs to --criterion second-order, not gisp"):
        gisp.prune(tiny_model(), tiny_tokens(), criterion="gisp", first_order="shrunk")


def test_runs_of_a_plain_first_order_term_resume_as_such(tmp_path):
    options: dict[str, Any] = {
        "criterion": "second-order",
        "sparsity": 0.4,
        "steps": 4,
        "batch_tokens": 48,
        "device": "cpu",
        "align": 2,
    }
    tokens = tiny_tokens(12)
    whole = gisp.prune(tiny_model(), tokens, first_order="plain", **options)

    def cut(record, steps):
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gisp.prune(tiny_model(), tokens, out=tmp_path / "run", on_step=cut, first_order="plain", **options)
    with pytest.raises(GispError, match="made with first_order plain, not shrunk"):
        gisp.prune(tiny_model(), tokens, out=tmp_path / "run", resume=True, **options)
    again = gisp.prune(tiny_model(), tokens, out=tmp_path / "run", resume=True, first_order="plain", **options)
    assert all(torch.equal(at, again.removed_at[name]) for name, at in whole.removed_at.items())


def test_one_shot_shrinks_where_it_is_asked_to():
    options: dict[str, Any] = {
        "criterion": "second-order",
        "one_shot": True,
        "sparsity": 0.4,
        "device": "cpu",
        "align": 1,
    }
    shrinking: list[dict[str, Any]] = [{}, {"first_order": "plain"}, {"first_order": "shrunk"}]
    plain, asked, shrunk = (gisp.prune(tiny_model(), tiny_tokens(12), **options, **given) for given in shrinking)
    assert all(torch.equal(at, asked.removed_at[name]) for name, at in plain.removed_at.items())
    assert any(not torch.equal(at, shrunk.removed_at[name]) for name, at in plain.removed_at.items())


def test_a_step_weighs_its_noise_by_its_sequences_and_by_what_is_averaged(monkeypatch):
    seen, weights = [], module.first_order_weights

    def spy(sums, kinds, units, batches):
        seen.append((units, batches))
        return weights(sums, kinds, units, batches)

    monkeypatch.setattr(module, "first_order_weights", spy)
    options: dict[str, Any] = {"sparsity": 0.3, "steps": 6, "align": 1, "device": "cpu"}
    tokens = tiny_tokens(12, 16)
    gisp.prune(tiny_model(), tokens, batch_tokens=48, ema=0.7, **options)
    # Twelve sequences of which a step sees three: no more than four batches are new.
    wanted = [min(averaged_batches(0.7, step), 4.0) for step in range(1, 7)]
    assert [units for units, _ in seen] == [3] * 6 and [batches for _, batches in seen] == pytest.approx(wanted)
    assert wanted[0] == 1 and wanted[3] < 4 == wanted[5]
    seen.clear()
    gisp.prune(tiny_model(), tokens, engine="exact", **options)
    assert seen == [(12, 1.0)] * 6
    seen.clear()
    gisp.prune(tiny_model(), tokens, batch_tokens=16, **options)
    assert not seen
