"""A step of short and long sequences: split where padding costs more than a pass, and scored as in one pass."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from question_cases import answers, mixed
from score_cases import gradient_scorer
from tiny import tiny_model

from gisp.data import batches
from gisp.data.batches import even_stretches
from gisp.model.structures import map_model


def took(lengths: list[int], stretches: list[tuple[int, int]], cost: int) -> int:
    return sum(cost + (stop - start) * max(lengths[start:stop]) for start, stop in stretches)


@pytest.mark.parametrize("seed", range(6))
def test_no_other_way_to_part_a_step_takes_less(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_PASS_TOKENS", 30)
    generator = torch.Generator().manual_seed(seed)
    short = torch.randint(1, 9, (6,), generator=generator).tolist()
    lengths = [*short, *torch.randint(20, 60, (4,), generator=generator).tolist()]
    lengths = [lengths[i] for i in torch.randperm(10, generator=generator).tolist()] if seed % 2 else lengths
    inside = {3, 4}
    places = [i for i in range(1, len(lengths)) if i not in inside]
    ways = [
        list(zip((0, *cuts), (*cuts, len(lengths)), strict=True))
        for count in range(len(places) + 1)
        for cuts in combinations(places, count)
    ]
    found = even_stretches(lengths, inside)
    assert found in ways
    assert took(lengths, found, 30) == min(took(lengths, way, 30) for way in ways)


def test_sequences_of_about_one_length_pass_together() -> None:
    assert even_stretches([512] * 63 + [400], set()) == [(0, 64)]
    assert even_stretches([40] * 200 + [512] * 3, set()) == [(0, 200), (200, 203)]
    # So many that not every place is looked at.
    found = even_stretches([30] * 1000 + [512] * 10, set())
    assert found[0][0] == 0 and found[-1][1] == 1010 and took([30] * 1000 + [512] * 10, found, 0) < 50_000


def test_a_split_step_has_the_scores_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model_map = mixed(), map_model(tiny_model())
    found = []
    for cost in (10**6, 1):
        monkeypatch.setattr(batches, "_PASS_TOKENS", cost)
        scorer = gradient_scorer(model_map, data, preset="fast", batch_tokens=400, criterion="second-order")
        found.append((scorer, scorer.score(1, model_map.groups)))
    (_, whole), (split_by, split) = found
    numbers = split_by._context.steps.numbers(1)
    assert len(list(split_by._context.steps.batches(numbers))) > 1
    assert split.tokens < whole.tokens
    assert split.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    for name, values in whole.scores.items():
        torch.testing.assert_close(split.scores[name], values, rtol=1e-3, atol=1e-6)


def test_criteria_of_one_pass_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_PASS_TOKENS", 1)
    model_map = map_model(tiny_model())
    for criterion, split in (("gisp", False), ("second-order", True)):
        steps = gradient_scorer(model_map, mixed(), preset="fast", criterion=criterion)._context.steps
        assert (len(list(steps.batches(steps.numbers(1)))) > 1) is split
    steps = gradient_scorer(model_map, answers(), preset="fast", criterion="second-order", batch_size=3)._context.steps
    assert list(steps.batches(steps.numbers(1)[:7])) == [(0, 3), (3, 6), (6, 7)]
