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
from gisp.model.structures import ModelMap, map_model
from gisp.score.fused import ImportancePass, MicroBatch
from gisp_kernels import loss_change
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
    sums, loss = run.gate_sums([MicroBatch(ids, labels, weights)], live(model_map))[0]
    scores = {name: loss_change(values) for name, values in sums.items()}
    assert_scores(scores, expected)
    assert torch.equal(loss, run.score([MicroBatch(ids, labels, weights)], live(model_map))[0][1])
    # One layer alone: what lies below it gets no gradient.
    name, count = live(model_map)[-1]
    some, _ = run.gate_sums([MicroBatch(ids, labels, weights)], [(name, count)])[0]
    torch.testing.assert_close(some[name], sums[name], rtol=1e-12, atol=0)
    nothing, same_loss = run.gate_sums([MicroBatch(ids, labels, weights)], [])[0]
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
