"""The removal rules against slow, literal versions of themselves and against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import select_oracle
import torch
from select_oracle import OracleBlock, OracleSelector
from tiny import tiny_model

from gisp.model.structures import map_model, protected_layers
from gisp.run.metrics.measure import score_histogram
from gisp.select.schedule import parameter_target, structure_ratio, threshold_rank
from gisp.select.selector import Ranking, Selection, Selector, StepRemoval
from gisp.select.whole_layers import LayerSelector


def make_selector(**options):
    defaults = {"norm": "params", "protected": frozenset({3}), "align": 1, "keep_minimum": False}
    return Selector(map_model(tiny_model()), **{**defaults, **options})


def random_scores(selector: Selector, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {b.name: torch.rand(b.stop - b.start, generator=generator) for b in selector.groups if not b.protected}


def rank(selector: Selector, scores: dict[str, torch.Tensor]) -> Ranking:
    absent = {b.name: torch.zeros(b.stop - b.start) for b in selector.groups}
    return selector.rank(torch.cat([*(absent | scores).values()]))


def chosen(selector: Selector, selection: Selection) -> StepRemoval:
    return selector.removal(selection.removed, float(selection.threshold))


def literal_budget(selector: Selector, normalised: np.ndarray, target: float) -> set[int]:
    """Walk the ranking and stop at the first structure that does not fit."""
    cost = {n: b.cost for b in selector.groups for n in range(b.start, b.stop)}
    spent, found = selector.removed_parameters, set()
    for number in sorted(range(selector.size), key=lambda s: (normalised[s], s)):
        if normalised[number] == np.inf or spent + cost[number] > target:
            break
        spent += cost[number]
        found.add(number)
    return found


def numbers(selector: Selector, removal: StepRemoval) -> set[int]:
    starts = {b.name: b.start for b in selector.groups}
    found = {starts[name] + int(i) for name, index in removal.removed.items() for i in index}
    assert sorted(found) == removal.structures.tolist()
    return found


@pytest.mark.parametrize("seed", range(5))
def test_budget_rule_equals_the_literal_walk_over_several_steps(seed):
    selector = make_selector()
    for step in range(1, 6):
        ranking = rank(selector, random_scores(selector, seed * 10 + step))
        target = parameter_target(0.5, step, 5, 4 * 32 * 32 * 5)
        before = selector.removed_parameters
        expected = literal_budget(selector, ranking.values.numpy(), target)
        selection = selector.within_target(ranking, target)
        removal = chosen(selector, selection)
        assert numbers(selector, removal) == expected
        selector.apply(removal, selection)
        assert removal.parameters == selector.removed_parameters - before
        assert selector.removed_parameters <= target


@pytest.mark.parametrize("seed", range(5))
def test_threshold_rule_equals_the_literal_k_th_value(seed):
    selector = make_selector(norm="official")
    gone: set[int] = set()
    for step in range(1, 7):
        ranking = rank(selector, random_scores(selector, seed * 10 + step))
        normalised = ranking.values.numpy()
        ratio = structure_ratio(0.6, step, 6)
        ranked = sorted(-np.inf if s in gone else float(normalised[s]) for s in range(selector.size))
        k = selector.size - int(selector.size * (1 - ratio)) + 1
        expected = {s for s in range(selector.size) if s not in gone and normalised[s] <= ranked[k - 1]}
        selection = selector.below_threshold(ranking, ratio)
        removal = chosen(selector, selection)
        assert numbers(selector, removal) == expected
        gone |= expected
        selector.apply(removal, selection)
    assert len(gone) >= 0.6 * selector.size


def test_first_official_step_removes_exactly_one_structure():
    selector = make_selector(norm="official")
    selection = selector.below_threshold(rank(selector, random_scores(selector, 0)), structure_ratio(0.6, 1, 9))
    assert len(numbers(selector, chosen(selector, selection))) == 1


def test_ties_go_to_heads_first_then_the_lowest_index():
    selector = make_selector(norm="none")
    scores = {name: torch.ones_like(values) for name, values in random_scores(selector, 0).items()}
    cost = selector.groups[0].cost
    removal = chosen(selector, selector.within_target(rank(selector, scores), 5 * cost))
    assert {k: v.tolist() for k, v in removal.removed.items()} == {
        "layers.0.heads": [0, 1, 2, 3],
        "layers.1.heads": [0],
    }


@pytest.mark.parametrize("align", [4, 8, 16])
def test_aligned_widths_are_multiples_and_use_the_budget(align):
    selector = make_selector(align=align, keep_minimum=True)
    total = 0
    for step in range(1, 9):
        target = 0.06 * step * map_model(tiny_model()).decoder_parameters
        selection = selector.within_target(rank(selector, random_scores(selector, step)), target)
        selector.apply(chosen(selector, selection), selection)
        total = selector.removed_parameters
        assert total <= target
        for block in selector.groups:
            live = int((~selector.removed[block.start : block.stop]).sum())
            if block.name.endswith("channels"):
                assert live == 24 or live % align == 0
                assert live >= min(align, 24)
            else:
                assert live >= 1
    # What is left of the budget is less than one aligned removal in every block.
    target = min(target, selector.removable_parameters)
    assert total > target - selector.groups[-1].cost * align - selector.groups[0].cost


def test_deferred_channels_are_the_best_of_their_layer():
    selector = make_selector(align=8, norm="none")
    scores = {name: torch.full_like(v, 100.0) for name, v in random_scores(selector, 0).items()}
    scores["layers.1.channels"] = torch.arange(24.0)
    target = 11 * selector.groups[-1].cost
    removal = chosen(selector, selector.within_target(rank(selector, scores), target))
    assert {k: v.tolist() for k, v in removal.removed.items()} == {"layers.1.channels": list(range(8))}


def test_normalisers_divide_by_what_their_names_say():
    model_map = map_model(tiny_model("llama-mha"))
    ones = {"layers.0.heads": torch.ones(4), "layers.0.channels": torch.ones(24)}
    expected = {
        "params": (1 / (4 * 8 * 32), 1 / (3 * 32)),
        "official": (1 / (4 * 8 * 32), 1 / (3 * 24)),
        "none": (1.0, 1.0),
    }
    for norm, (head, channel) in expected.items():
        selector = Selector(model_map, norm=norm, protected=frozenset(), align=1, keep_minimum=False)
        normalised = rank(selector, ones).values
        assert normalised[0] == pytest.approx(head)
        assert normalised[4 * 4] == pytest.approx(channel)
    shared = map_model(tiny_model("llama-gqa"))
    selector = Selector(shared, norm="params", protected=frozenset(), align=1, keep_minimum=False)
    assert rank(selector, ones).values[0] == pytest.approx(1 / (2 * 8 * 32))
    selector = Selector(shared, norm="official", protected=frozenset(), align=1, keep_minimum=False)
    assert rank(selector, ones).values[0] == pytest.approx(1 / (4 * 8 * 32))


def test_removable_parameters_respect_protection_and_minima():
    free = make_selector(protected=frozenset())
    assert free.removable_parameters == 4 * (4 * free.groups[0].cost + 24 * free.groups[-1].cost)
    tight = make_selector(protected=frozenset({0, 3}), align=16, keep_minimum=True)
    assert tight.removable_parameters == 2 * (3 * tight.groups[0].cost + 8 * tight.groups[-1].cost)


def test_threshold_rank_and_ratio_schedule():
    assert [threshold_rank(100, r) for r in (0.0, 0.25, 0.999)] == [1, 26, 100]
    assert [structure_ratio(0.6, t, 4) for t in (1, 4)] == [0.0, pytest.approx(0.6)]
    assert structure_ratio(0.6, 1, 1) == 0.6


def test_protected_layers_round_down_at_the_start():
    assert protected_layers(32, 0.1, 1) == {0, 1, 2, 31}
    assert protected_layers(9, 0.1, 2) == {7, 8}


def oracle_of(selector: Selector) -> OracleSelector:
    return OracleSelector(
        [OracleBlock(b.stop - b.start, b.cost, b.divisor, b.minimum, b.multiple, b.protected) for b in selector.groups]
    )


SCORES = {
    "spread": lambda n, g: torch.rand(n, generator=g),
    "ties": lambda n, g: torch.randint(0, 4, (n,), generator=g).float(),
    "equal": lambda n, g: torch.ones(n),
    "zeros": lambda n, g: torch.rand(n, generator=g) * (torch.rand(n, generator=g) < 0.5),
    "infinite": lambda n, g: torch.rand(n, generator=g).masked_fill(torch.rand(n, generator=g) < 0.2, torch.inf),
    "skewed": lambda n, g: torch.rand(n, generator=g) ** 12,
}


@pytest.mark.parametrize("rule", ["target", "threshold"])
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("keep_minimum", [False, True])
@pytest.mark.parametrize("align", [1, 4, 7, 16])
def test_choices_equal_the_numpy_selector(align, keep_minimum, kind, rule):
    model_map = map_model(tiny_model("llama-mha", num_attention_heads=8, num_key_value_heads=8, intermediate_size=50))
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        selector = Selector(
            model_map,
            norm=("params", "official", "none")[seed % 3],
            protected=(frozenset(), frozenset({0}), frozenset({1, 3}))[0 if kind == "infinite" else seed // 2],
            align=align,
            keep_minimum=keep_minimum,
        )
        oracle = oracle_of(selector)
        # Infinite scores tie with what is barred, so nothing can be compared once something is: one step from dense.
        for step in (1 + seed,) if kind == "infinite" else range(1, 8):
            scores = SCORES[kind](selector.size, generator)
            ranking = selector.rank(scores)
            normalised = oracle.normalise(scores.numpy())
            assert np.array_equal(ranking.values.numpy(), normalised)
            if rule == "target":
                target = 0.14 * step * sum((b.stop - b.start) * b.cost for b in selector.groups)
                expected = oracle.within_target(normalised, target)
                selection = selector.within_target(ranking, target)
            else:
                ratio = structure_ratio(0.9, step, 8)
                expected = oracle.below_threshold(normalised, ratio)
                selection = selector.below_threshold(ranking, ratio)
            removal = chosen(selector, selection)
            assert removal.structures.tolist() == expected.tolist()
            assert removal.threshold == (normalised[expected].max() if len(expected) else None)
            selector.apply(removal, selection)
            oracle.removed[expected] = True
            assert np.array_equal(selector.removed, oracle.removed)
            assert selector.removed_parameters == oracle.removed_parameters


@pytest.mark.parametrize("kind", SCORES)
def test_histogram_equals_numpy(kind):
    for seed, scale, shift in ((0, 1.0, 0.0), (1, 1e-20, 0.0), (2, 0.0, 0.0), (3, 1.0, 0.4), (4, 1.0, 1e9)):
        selector = make_selector()
        scores = SCORES[kind](selector.size, torch.Generator().manual_seed(seed)) * scale - shift
        scores = torch.where(scores.isnan(), torch.inf, scores)
        ranking = selector.rank(scores)
        edges, counts = score_histogram(ranking, selector.first_channel)
        assert selector.first_channel == 16
        wanted, expected = select_oracle.score_histogram(ranking.values.numpy(), 16, 40)
        assert edges.tolist() == pytest.approx(wanted.tolist(), rel=1e-14)
        # A score on an edge falls either way when two libraries round a logarithm differently.
        positive = ranking.values.numpy()
        positive = positive[positive > 0]
        wide = (np.abs(np.log10(positive[:, None]) - wanted[None, 1:-1]) > 1e-12).all()
        if wide:
            assert counts.tolist() == expected.tolist()
        assert counts.sum() == expected.sum()


def test_a_choice_given_again_leaves_the_selector_as_it_was():
    done, again = make_selector(align=4), make_selector(align=4)
    for step in range(1, 4):
        target = 0.1 * step * map_model(tiny_model()).decoder_parameters
        selection = done.within_target(rank(done, random_scores(done, step)), target)
        removal = chosen(done, selection)
        done.apply(removal, selection)
        again.apply(*again.given(removal.removed))
    assert np.array_equal(done.removed, again.removed)
    scores, target = random_scores(done, 9), 0.4 * map_model(tiny_model()).decoder_parameters
    one, other = (chosen(s, s.within_target(rank(s, scores), target)) for s in (done, again))
    assert one.structures.tolist() == other.structures.tolist()
    assert one.parameters > 0


@pytest.mark.parametrize("gqa", ["query", "balanced", "group"])
def test_a_selection_reads_no_value_on_the_way(gqa):
    # Meta tensors have none: whatever would wait for a GPU, be it an item or a shape that depends on values, fails.
    selector = Selector(
        map_model(tiny_model(), gqa), norm="params", protected=frozenset({3}), align=4, keep_minimum=True
    )
    for name, value in vars(selector).items():
        if isinstance(value, torch.Tensor):
            setattr(selector, name, value.to("meta"))
    ranking = selector.rank(torch.empty(len(selector.removed), device="meta"))
    for selection in (selector.within_target(ranking, 9000.0), selector.below_threshold(ranking, 0.4)):
        assert selection.removed.shape == selector.removed.shape
        assert selection.units.shape == (8,)
    assert score_histogram(ranking, selector.first_channel)[1].shape == (2, 41)
    with pytest.raises(RuntimeError, match="meta"):
        float(selection.threshold)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_scores_that_are_all_equal_decide_nothing(value):
    selector = make_selector()
    scores = torch.full((len(selector.removed),), value)
    assert not selector.decides(scores)
    # A protected structure's score is none; one candidate that differs is enough.
    protected = selector.groups[3].start
    assert selector.groups[3].protected
    assert not selector.decides(scores.scatter(0, torch.tensor([protected]), 9.0))
    assert selector.decides(scores.scatter(0, torch.tensor([selector.groups[1].start]), 9.0))


def test_a_single_layer_or_structure_left_is_no_tie():
    layers = LayerSelector(map_model(tiny_model(layers=3)), protected=frozenset({0, 1}))
    assert layers.decides(torch.ones(len(layers.removed)))
    two = LayerSelector(map_model(tiny_model(layers=3)), protected=frozenset({0}))
    assert not two.decides(torch.ones(len(two.removed)))
    none = make_selector(protected=frozenset(range(4)))
    assert none.decides(torch.ones(len(none.removed)))
