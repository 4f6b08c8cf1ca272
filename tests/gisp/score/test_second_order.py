"""Second-order scores of the driver: both passes against gates written into the model, for any batching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gate_oracle import gate_scores
from score_cases import REMOVALS, gradient_scorer, live, pruned, ragged
from tiny import FAMILIES, tiny_model, tiny_tokens

import gisp
from gisp.data import Sequences
from gisp.data.sequences import row_weights
from gisp.errors import GispError
from gisp.model.structures import ModelMap, map_model
from gisp.score import gradient as module
from gisp.score.first_order import averaged_batches, first_order_weights, shrinkage
from gisp.score.fused import ImportancePass, MicroBatch
from gisp.score.objectives import sequence_curvature
from gisp_kernels import gate_sums, loss_change
from gisp_kernels.record.gates import gate_projection


def oracle(model, model_map: ModelMap, rows, weights):
    groups = [(g.name, p.linear, p.block) for g in model_map.groups if g.count and (p := gate_projection(g))]
    return gate_scores(model, rows, weights, groups)


def assert_scores(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), values, rtol=1e-3, atol=2e-5 * float(values.abs().max()))


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_pass_is_the_formula(family, removal):
    model, model_map = pruned(family, removal)
    data, weights = ragged(), row_weights([1, -1, 1, 1, -1])
    expected = oracle(model, model_map, data.rows, weights)
    ids, labels = data.batch(list(range(len(data))))
    run = ImportancePass(model_map)
    sums, loss = run.gate_sums(MicroBatch(ids, labels, weights), live(model_map))
    scores = {name: loss_change(values) for name, values in sums.items()}
    assert_scores(scores, expected)
    assert torch.equal(loss, run.score(MicroBatch(ids, labels, weights), live(model_map))[1])
    # One layer alone: what lies below it gets no gradient.
    name, count = live(model_map)[-1]
    some, _ = run.gate_sums(MicroBatch(ids, labels, weights), [(name, count)])
    torch.testing.assert_close(some[name], sums[name], rtol=1e-12, atol=0)
    nothing, same_loss = run.gate_sums(MicroBatch(ids, labels, weights), [])
    assert nothing == {} and torch.equal(same_loss, loss)


def scorer_of(model_map, data, kind, batch_size, loss=None):
    return gradient_scorer(
        model_map,
        data,
        engine=kind,
        batch_size=batch_size,
        batch_tokens=8192,
        seed=0,
        loss=loss,
        criterion="second-order",
    )


@pytest.mark.parametrize("kind", ["stream", "exact"])
@pytest.mark.parametrize("batch_size", [1, 2, None])
@pytest.mark.parametrize(("family", "gqa"), [("llama-mha", "query"), ("llama-bias", "query"), ("llama-gqa", "group")])
def test_any_batching_and_both_passes_give_the_formula(family, gqa, batch_size, kind):
    model, data = tiny_model(family), ragged()
    model_map = map_model(model, gqa)
    expected = oracle(model, model_map, data.rows, [1 / len(data)] * len(data))
    fused = scorer_of(model_map, data, kind, batch_size)
    assert_scores(fused.score(1, model_map.groups).scores, expected)
    assert fused.refused is None
    by_autograd = scorer_of(model_map, data, kind, batch_size)
    by_autograd.refused = "asked to"
    assert_scores(by_autograd.score(1, model_map.groups).scores, expected)


def test_margin_counts_the_curvature_of_both_sides():
    model, plain = tiny_model(), ragged()
    data = Sequences(plain.rows, (1, -1, -1, 1, -1), ((0, 1, 2), (3, 4)))
    model_map = map_model(model)
    expected = oracle(model, model_map, plain.rows, row_weights([1, -1, -1, 1, -1]))
    assert_scores(scorer_of(model_map, data, "exact", 2).score(1, model_map.groups).scores, expected)


def test_an_own_loss_is_scored_by_autograd():
    model, data = tiny_model(), ragged()
    model_map = map_model(model)

    def loss(model, input_ids, labels):
        from gisp.score.objectives import sequence_nll

        return sequence_nll(model, input_ids, labels)

    expected = oracle(model, model_map, data.rows, [1 / len(data)] * len(data))
    assert_scores(scorer_of(model_map, data, "stream", None, loss).score(1, model_map.groups).scores, expected)


def test_a_sequence_of_no_weight_has_no_curvature():
    labels = torch.tensor([[1, 2, 3], [1, -100, 3], [1, 2, -100]])
    found = sequence_curvature(labels, torch.tensor([0.5, -0.25, 0.0]))
    assert found.tolist() == [4.0, 4.0, 0.0]


def test_a_step_removes_the_lowest_by_the_formula():
    model, tokens = tiny_model("llama-mha"), tiny_tokens(6)
    model_map = map_model(model)
    expected = oracle(model, model_map, [(row, row) for row in tokens], [1 / 6] * 6)
    per_parameter = {
        (name, i): value / (4 * 8 * 32 if name.endswith("heads") else 3 * 32)
        for name, values in expected.items()
        for i, value in enumerate(values.tolist())
        if not name.startswith("layers.3")
    }
    options: dict[str, Any] = {"preset": "paper", "steps": 1, "sparsity": 0.3, "device": "cpu", "batch_size": 2}
    trajectory = gisp.prune(model, tokens, criterion="second-order", first_order="plain", **options)
    removed = {(name, int(i)) for name, at in trajectory.removed_at.items() for i in at.nonzero()}
    assert removed == set(sorted(per_parameter, key=lambda key: per_parameter[key])[: len(removed)])
    assert len(removed) > 10 and min(per_parameter.values()) < 0


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
        MicroBatch(*data.batch(list(range(len(data)))), weights), live(model_map)
    )[0]
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


def test_runs_of_it_resume_and_repeat(tmp_path):
    options: dict[str, Any] = {
        "criterion": "second-order",
        "sparsity": 0.4,
        "steps": 6,
        "align": 2,
        "batch_tokens": 48,
        "device": "cpu",
    }
    tokens = tiny_tokens(12)
    first = gisp.prune(tiny_model(), tokens, **options)
    stop = []

    def interrupt(record, steps):
        stop.append(record)
        if len(stop) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gisp.prune(tiny_model(), tokens, out=tmp_path / "run", on_step=interrupt, **options)
    again = gisp.prune(tiny_model(), tokens, out=tmp_path / "run", resume=True, **options)
    for name, at in first.removed_at.items():
        assert torch.equal(at, again.removed_at[name])


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
