"""The removal rules against slow, literal versions of themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_model

from gisp.schedule import parameter_target, structure_ratio, threshold_rank
from gisp.select import Choice, Selector
from gisp.structures import map_model, protected_layers


def make_selector(**options):
    defaults = {"norm": "params", "protected": frozenset({3}), "align": 1, "keep_minimum": False}
    return Selector(map_model(tiny_model()), **{**defaults, **options})


def random_scores(selector: Selector, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {b.name: torch.rand(b.stop - b.start, generator=generator) for b in selector.blocks if not b.protected}


def literal_budget(selector: Selector, normalised: np.ndarray, target: float) -> set[int]:
    """Walk the ranking and stop at the first structure that does not fit."""
    spent, chosen = selector.removed_parameters, set()
    for number in sorted(range(selector.size), key=lambda s: (normalised[s], s)):
        cost = int(selector._cost[number])
        if normalised[number] == np.inf or spent + cost > target:
            break
        spent += cost
        chosen.add(number)
    return chosen


def numbers(selector: Selector, choice: Choice) -> set[int]:
    starts = {b.name: b.start for b in selector.blocks}
    return {starts[name] + int(i) for name, index in choice.removed.items() for i in index}


@pytest.mark.parametrize("seed", range(5))
def test_budget_rule_equals_the_literal_walk_over_several_steps(seed):
    selector = make_selector()
    for step in range(1, 6):
        normalised = selector.normalise(random_scores(selector, seed * 10 + step))
        target = parameter_target(0.5, step, 5, 4 * 32 * 32 * 5)
        expected = literal_budget(selector, normalised, target)
        choice = selector.within_target(normalised, target)
        assert numbers(selector, choice) == expected
        assert choice.parameters == sum(int(selector._cost[n]) for n in expected)
        selector.apply(choice)
        assert selector.removed_parameters <= target


@pytest.mark.parametrize("seed", range(5))
def test_threshold_rule_equals_the_literal_k_th_value(seed):
    selector = make_selector(norm="official")
    gone: set[int] = set()
    for step in range(1, 7):
        normalised = selector.normalise(random_scores(selector, seed * 10 + step))
        ratio = structure_ratio(0.6, step, 6)
        ranked = sorted(-np.inf if s in gone else float(normalised[s]) for s in range(selector.size))
        k = selector.size - int(selector.size * (1 - ratio)) + 1
        expected = {s for s in range(selector.size) if s not in gone and normalised[s] <= ranked[k - 1]}
        choice = selector.below_threshold(normalised, ratio)
        assert numbers(selector, choice) == expected
        gone |= expected
        selector.apply(choice)
    assert len(gone) >= 0.6 * selector.size


def test_first_official_step_removes_exactly_one_structure():
    selector = make_selector(norm="official")
    choice = selector.below_threshold(selector.normalise(random_scores(selector, 0)), structure_ratio(0.6, 1, 9))
    assert len(numbers(selector, choice)) == 1


def test_ties_go_to_heads_first_then_the_lowest_index():
    selector = make_selector(norm="none")
    scores = {name: torch.ones_like(values) for name, values in random_scores(selector, 0).items()}
    cost = selector.blocks[0].cost
    choice = selector.within_target(selector.normalise(scores), 5 * cost)
    assert {k: v.tolist() for k, v in choice.removed.items()} == {
        "layers.0.heads": [0, 1, 2, 3],
        "layers.1.heads": [0],
    }


@pytest.mark.parametrize("align", [4, 8, 16])
def test_aligned_widths_are_multiples_and_use_the_budget(align):
    selector = make_selector(align=align, keep_minimum=True)
    total = 0
    for step in range(1, 9):
        normalised = selector.normalise(random_scores(selector, step))
        target = 0.06 * step * map_model(tiny_model()).decoder_parameters
        choice = selector.within_target(normalised, target)
        selector.apply(choice)
        total = selector.removed_parameters
        assert total <= target
        for block in selector.blocks:
            live = int((~selector.removed[block.start : block.stop]).sum())
            if block.name.endswith("channels"):
                assert live == 24 or live % align == 0
                assert live >= min(align, 24)
            else:
                assert live >= 1
    # What is left of the budget is less than one aligned removal in every block.
    target = min(target, selector.removable_parameters)
    assert total > target - selector.blocks[-1].cost * align - selector.blocks[0].cost


def test_deferred_channels_are_the_best_of_their_layer():
    selector = make_selector(align=8, norm="none")
    scores = {name: torch.full_like(v, 100.0) for name, v in random_scores(selector, 0).items()}
    scores["layers.1.channels"] = torch.arange(24.0)
    target = 11 * selector.blocks[-1].cost
    choice = selector.within_target(selector.normalise(scores), target)
    assert {k: v.tolist() for k, v in choice.removed.items()} == {"layers.1.channels": list(range(8))}


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
        normalised = selector.normalise(ones)
        assert normalised[0] == pytest.approx(head)
        assert normalised[4 * 4] == pytest.approx(channel)
    shared = map_model(tiny_model("llama-gqa"))
    selector = Selector(shared, norm="params", protected=frozenset(), align=1, keep_minimum=False)
    assert selector.normalise(ones)[0] == pytest.approx(1 / (2 * 8 * 32))
    selector = Selector(shared, norm="official", protected=frozenset(), align=1, keep_minimum=False)
    assert selector.normalise(ones)[0] == pytest.approx(1 / (4 * 8 * 32))


def test_removable_parameters_respect_protection_and_minima():
    free = make_selector(protected=frozenset())
    assert free.removable_parameters == 4 * (4 * free.blocks[0].cost + 24 * free.blocks[-1].cost)
    tight = make_selector(protected=frozenset({0, 3}), align=16, keep_minimum=True)
    assert tight.removable_parameters == 2 * (3 * tight.blocks[0].cost + 8 * tight.blocks[-1].cost)


def test_threshold_rank_and_ratio_schedule():
    assert [threshold_rank(100, r) for r in (0.0, 0.25, 0.999)] == [1, 26, 100]
    assert [structure_ratio(0.6, t, 4) for t in (1, 4)] == [0.0, pytest.approx(0.6)]
    assert structure_ratio(0.6, 1, 1) == 0.6


def test_protected_layers_round_down_at_the_start():
    assert protected_layers(32, 0.1, 1) == {0, 1, 2, 31}
    assert protected_layers(9, 0.1, 2) == {7, 8}
