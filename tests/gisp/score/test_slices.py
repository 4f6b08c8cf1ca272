"""Steps split into slices: the sums of the whole, example by example, for every objective and pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from question_cases import answers, letters, mixed
from score_cases import gradient_scorer, ragged
from tiny import tiny_model

from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.data.batches import StepBatches
from gisp.errors import GispError
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.score.base import make_scorer
from gisp.score.context import Context

OPTIONS: dict[str, Any] = {"preset": "fast", "engine": "exact", "ema": 0.0}


@pytest.mark.parametrize("slices", [1, 2, 3, 16])
@pytest.mark.parametrize("refused", [None, "a test says so"])
@pytest.mark.parametrize("make", [ragged, answers, letters, mixed])
def test_slices_add_up_to_the_step(make: Callable[[], Sequences], refused: str | None, slices: int) -> None:
    data = make()
    model_map = map_model(tiny_model())
    found = []
    for parts in (None, slices):
        scorer = gradient_scorer(
            model_map, data, **OPTIONS, criterion="second-order", first_order="shrunk", slices=parts
        )
        scorer.refused = refused
        found.append(scorer.score(1, model_map.groups))
    whole, split = found
    assert split.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    for name, values in whole.scores.items():
        torch.testing.assert_close(split.scores[name], values, rtol=1e-3, atol=1e-6)
    # Shorter stretches are padded less.
    assert 0 < split.tokens <= whole.tokens


def test_examples_stay_whole_and_none_is_lost() -> None:
    data = answers()
    steps = StepBatches(map_model(tiny_model()), data, kind="exact", batch_size=None, tokens=1, seed=0)
    ends = {0}
    for example in data.examples:
        ends.add(max(ends) + len(example))
    for count in (1, 2, 3, 9):
        stretches = steps.slices(1, count)
        assert len(stretches) == count
        assert {bound for stretch in stretches for bound in stretch} <= ends
        assert [i for start, stop in stretches for i in range(start, stop)] == list(range(len(steps.numbers(1))))


def test_a_forward_pass_in_slices_has_the_loss_of_the_whole() -> None:
    shrinkable = ShrinkableModel(map_model(tiny_model()))
    found = [
        Context(shrinkable, ragged(), make_config(**OPTIONS, criterion="second-order", slices=slices)).forward_pass(1)
        for slices in (None, 3, 8)
    ]
    for loss, tokens in found[1:]:
        assert loss.item() == pytest.approx(found[0][0].item(), rel=1e-6)
        assert 0 < tokens <= found[0][1]


@pytest.mark.parametrize("slices", [1, 3, 16])
@pytest.mark.parametrize("criterion", ["flap", "wanda-sp"])
def test_statistics_of_slices_are_those_of_the_step(criterion: str, slices: int) -> None:
    shrinkable = ShrinkableModel(map_model(tiny_model()))
    options = {**OPTIONS, "first_order": "plain"}
    whole, split = (
        make_scorer(Context(shrinkable, ragged(), make_config(**options, criterion=criterion, slices=count))).score(
            1, shrinkable.map.groups
        )
        for count in (None, slices)
    )
    assert split.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    for name, values in whole.scores.items():
        torch.testing.assert_close(split.scores[name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("criterion", ["gisp", "signed", "magnitude", "learned-gates", "block-influence"])
def test_only_sums_that_add_up_are_split(criterion: str) -> None:
    with pytest.raises(GispError, match=f"--slices 4, .* goes with --criterion second-order, .*, not {criterion}"):
        make_config(criterion=criterion, slices=4)
    assert make_config(slices=4).slices == 4 and make_config().slices is None
    with pytest.raises(GispError, match="--slices is 0"):
        make_config(slices=0)


@pytest.mark.parametrize("make", [ragged, mixed])
def test_passes_of_what_is_not_passed_are_not_made(
    make: Callable[[], Sequences], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parting a step takes milliseconds, and slices pass by themselves."""
    asked: list[tuple[int, ...]] = []
    split = StepBatches.batches

    def counted(self: StepBatches, numbers: list[int], *given: Any, **options: Any) -> Any:
        asked.append(tuple(numbers))
        return split(self, numbers, *given, **options)

    monkeypatch.setattr(StepBatches, "batches", counted)
    data, model_map = make(), map_model(tiny_model())
    for slices in (None, 2):
        asked.clear()
        scorer = gradient_scorer(
            model_map, data, **OPTIONS, criterion="second-order", first_order="plain", slices=slices
        )
        scorer.score(1, model_map.groups)
        # Every sequence once: neither the whole step beside its slices, nor a slice again for its tokens or weights.
        assert len(asked) == (slices or 1)
        assert sorted(number for numbers in asked for number in numbers) == list(range(len(data.rows)))
