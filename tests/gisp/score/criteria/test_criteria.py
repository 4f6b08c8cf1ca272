"""Scores of every criterion against its formula, for any batch size, with padding, biases and shared heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from criteria_oracle import Oracle
from score_cases import ragged
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.config.criteria import CRITERIA
from gisp.config.options import make_config
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.score.base import StepScores, make_scorer
from gisp.score.context import Context
from gisp.score.criteria.activation import outlier_ratios

MODELS = pytest.mark.parametrize(
    ("family", "gqa"),
    [("llama-mha", "query"), ("llama-gqa", "query"), ("llama-bias", "query"), ("llama-bias", "group")],
)

FORMULAS: dict[str, Callable[[Oracle], dict[str, torch.Tensor]]] = {
    "magnitude": Oracle.magnitude,
    "taylor-local": Oracle.taylor,
    "wanda-sp": Oracle.wanda,
    "flap": partial(Oracle.flap, standardise=True),
}
# Others have tests of their own: in this file, in those of gradients, of learned gates, and in tests/conformance.
ELSEWHERE = {"gisp", "second-order", "signed", "random", "learned-gates", "block-influence"}


def scored(model: Any, **options: Any) -> StepScores:
    config = make_config(**{"preset": "paper", **options})
    shrinkable = ShrinkableModel(map_model(model, config.gqa))
    return make_scorer(Context(shrinkable, ragged(), config)).score(1, shrinkable.map.groups)


def assert_scores(found: StepScores, expected: dict[str, torch.Tensor], atol: float = 1e-7) -> None:
    assert found.scores.keys() == expected.keys() and found.finite
    for name, values in expected.items():
        assert found.scores[name].dtype == torch.float32
        torch.testing.assert_close(found.scores[name].double(), values, rtol=3e-5, atol=atol)


def test_every_criterion_has_a_test_of_its_formula() -> None:
    assert {*FORMULAS, *ELSEWHERE} == set(CRITERIA)


@MODELS
@pytest.mark.parametrize("batch_size", [2, None])
def test_every_criterion_is_its_formula(family: str, gqa: str, batch_size: int | None) -> None:
    oracle = Oracle(tiny_model(family), ragged().rows, group=gqa == "group")
    for criterion, formula in FORMULAS.items():
        found = scored(tiny_model(family), criterion=criterion, gqa=gqa, batch_size=batch_size)
        assert_scores(found, formula(oracle), atol=1e-5 if criterion == "flap" else 1e-7)
        assert found.loss.item() == pytest.approx(oracle.loss.item(), rel=1e-5)
        assert found.tokens == (16 + 16 + 12 + 12 + 9 if batch_size else 5 * 16)
    # Terms of both signs cancel: what is lost is relative to the largest sums.
    signed = oracle.signed()
    largest = max(float(values.max()) for values in signed.values())
    for engine in ("exact", "stream"):
        found = scored(tiny_model(family), criterion="signed", gqa=gqa, batch_size=batch_size, engine=engine)
        assert_scores(found, signed, atol=1e-5 * largest)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_the_caller_has_set_changes_no_run(criterion: str) -> None:
    options: dict[str, Any] = {"criterion": criterion, "sparsity": 0.3, "protect_first": 0.0, "protect_last": 0}
    if criterion == "learned-gates":
        options |= {"gate_steps": 3, "gate_rate": 0.5}
    elif criterion != "block-influence":
        options |= {"steps": 2, "align": 4}
    wanted = gisp.prune(tiny_model("llama-gqa"), tiny_tokens(), **options).removed_at
    for setting in (torch.no_grad(), default_dtype(torch.float64)):
        model = tiny_model("llama-gqa")
        with setting:
            found = gisp.prune(model, tiny_tokens(), **options).removed_at
        assert all(torch.equal(found[name], at) for name, at in wanted.items())


def test_flap_with_another_norm_is_not_standardised() -> None:
    found = scored(tiny_model("llama-bias"), criterion="flap", norm="params")
    assert_scores(found, Oracle(tiny_model("llama-bias"), ragged().rows).flap(standardise=False))


@pytest.mark.parametrize("criterion", ["gisp", "magnitude", "wanda-sp"])
def test_zscore_standardises_what_a_group_has_left(criterion: str) -> None:
    plain = scored(tiny_model(), criterion=criterion).scores
    found = scored(tiny_model(), criterion=criterion, norm="zscore")
    assert_scores(found, {n: (v.double() - v.double().mean()) / v.double().std() for n, v in plain.items()}, 1e-5)


def test_a_group_in_which_nothing_differs_scores_zero() -> None:
    model = tiny_model("llama-mha", num_attention_heads=1, num_key_value_heads=1)
    scores = scored(model, criterion="magnitude", norm="zscore").scores
    assert scores["layers.0.heads"].tolist() == [0.0]


@pytest.mark.parametrize("family", ["llama-mha", "llama-bias"])
def test_block_influence_is_one_minus_the_mean_cosine_for_all_of_a_layer(family: str) -> None:
    data, model = ragged(), tiny_model(family)
    expected = Oracle(model, data.rows).influence(data.rows)
    found = scored(model, criterion="block-influence", batch_size=2)
    for name, values in found.scores.items():
        layer = int(name.split(".")[1])
        assert values.tolist() == pytest.approx([expected[layer]] * len(values), rel=1e-4, abs=1e-6)


def test_outliers_are_counted_over_all_linear_layers_of_a_layer() -> None:
    model, data = tiny_model("llama-bias"), ragged()
    with torch.no_grad():
        # Gaussian weights have few outliers: make more of them, differently many by layer.
        for i, layer in enumerate(model.model.layers):
            layer.mlp.up_proj.weight[: i + 1] *= 20
            layer.self_attn.o_proj.weight[:, 3 - i] *= 20
    expected = Oracle(model, data.rows).outliers(5.0)
    config, shrinkable = make_config(preset="paper", batch_size=2), ShrinkableModel(map_model(model))
    found = outlier_ratios(Context(shrinkable, data, config), [0, 1, 3])
    assert len(set(expected)) == 4 and found == {i: expected[i] for i in (0, 1, 3)}


def test_random_scores_belong_to_structures_not_to_positions() -> None:
    shrinkable = ShrinkableModel(map_model(tiny_model()))
    scorer = make_scorer(Context(shrinkable, ragged(), make_config(preset="paper", criterion="random", seed=4)))
    before = scorer.score(1, shrinkable.map.groups).scores
    shrinkable.remove({"layers.1.heads": torch.tensor([0]), "layers.2.channels": torch.tensor([3, 1, 22])})
    after = scorer.score(2, shrinkable.map.groups).scores
    for name, values in after.items():
        assert torch.equal(values, before[name][shrinkable.order(name)])
    other = make_scorer(Context(shrinkable, ragged(), make_config(preset="paper", criterion="random", seed=5)))
    name = "layers.0.channels"
    assert not torch.equal(other.score(2, shrinkable.map.groups).scores[name], after[name])
    everything = torch.cat([*before.values()])
    assert everything.min() >= 0 and everything.max() < 1 and len(everything.unique()) == len(everything)


@pytest.mark.parametrize("criterion", ["signed", "wanda-sp", "block-influence"])
def test_scoring_leaves_the_model_as_it_was(criterion: str) -> None:
    model = tiny_model().train()
    scored(model, criterion=criterion)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
    assert not torch.are_deterministic_algorithms_enabled()
