"""Scores against plain autograd: batch size, padding and signs change nothing beyond rounding."""

from __future__ import annotations

import pytest
import torch
from recorder_oracle import grad_of
from score_cases import autograd_scores, gradient_scorer, ragged
from tiny import tiny_model, tiny_tokens

from gisp.data import Sequences
from gisp.data.batches import Sampler
from gisp.model.structures import map_model
from gisp.score.objectives import sequence_nll


def make_scorer(model, data, engine="exact", batch_size=None, batch_tokens=8192):
    return gradient_scorer(
        map_model(model), data, engine=engine, batch_size=batch_size, batch_tokens=batch_tokens, seed=0
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5, None])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "qwen3"])
def test_exact_scores_equal_autograd_for_any_batch_size(family, batch_size):
    model, data = tiny_model(family), ragged()
    groups = map_model(model).groups
    scored = make_scorer(model, data, batch_size=batch_size).score(1, groups)
    expected = autograd_scores(model, data, [1] * len(data))
    assert scored.scores.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(scored.scores[name], values, rtol=2e-5, atol=1e-7)


def test_stream_scores_of_one_batch_equal_exact_ones():
    model, data = tiny_model(), ragged()
    groups = map_model(model).groups
    stream = make_scorer(model, data, "stream").score(1, groups)
    exact = make_scorer(model, data, "exact").score(1, groups)
    assert stream.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    assert stream.finite and exact.finite
    for name, values in exact.scores.items():
        torch.testing.assert_close(stream.scores[name], values, rtol=2e-5, atol=1e-7)


def test_margin_in_one_signed_pass_equals_two_passes():
    model, plain = tiny_model(), ragged()
    signs = [1, -1, -1, 1, -1]
    data = Sequences(plain.rows, tuple(signs), ((0, 1, 2), (3, 4)))
    scored = make_scorer(model, data, batch_size=2).score(1, map_model(model).groups)
    grads: dict[int, list[torch.Tensor]] = {}
    for sign in (1, -1):
        model.zero_grad()
        chosen = [row for row, s in zip(plain.rows, signs, strict=True) if s == sign]
        for ids, labels in chosen:
            (sequence_nll(model, ids[None], labels[None]).sum() / len(chosen)).backward()
        grads[sign] = [grad_of(p.linear.weight).clone() for g in map_model(model).groups for p in g.projections]
    model.zero_grad()
    position = 0
    for group in map_model(model).groups:
        total = torch.zeros(group.count)
        for part in group.projections:
            product = (part.linear.weight.detach() * (grads[1][position] - grads[-1][position])).abs()
            total += product.sum(1 if part.axis == "row" else 0).view(group.count, -1).sum(1)
            position += 1
        torch.testing.assert_close(scored.scores[group.name], total, rtol=2e-5, atol=1e-7)


def test_scoring_leaves_the_model_as_it_was():
    model = tiny_model()
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    make_scorer(model, ragged()).score(1, map_model(model).groups)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_broken_weight_shows_in_loss_and_scores():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    scored = make_scorer(model, ragged()).score(7, map_model(model).groups)
    assert scored.loss.isnan() and not scored.finite


def test_sampler_walks_through_every_example_before_repeating():
    sampler = Sampler(10, 4, seed=3)
    seen = [n for step in range(1, 6) for n in sampler.numbers(step)]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert seen[:10] != seen[10:]
    assert Sampler(10, 4, seed=3).numbers(5) == sampler.numbers(5)
    assert Sampler(10, 4, seed=4).numbers(1) != sampler.numbers(1)


def test_stream_batch_has_about_the_asked_tokens():
    model = tiny_model()
    tokens = tiny_tokens(32, 16)
    data = Sequences.plain([(row, row) for row in tokens])
    scored = make_scorer(model, data, "stream", batch_tokens=100).score(1, map_model(model).groups)
    assert scored.tokens == 96
