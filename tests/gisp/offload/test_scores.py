"""Scores of a model whose layers lie in host memory: bit for bit those of the model on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from question_cases import answers, letters, mixed
from score_cases import REMOVALS, ragged
from tiny import FAMILIES, tiny_model

from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.offload.place import place
from gisp.offload.stream import LayerStream
from gisp.score.base import StepScores
from gisp.score.context import Context
from gisp.score.gradient import GradientScorer

CPU = torch.device("cpu")
# Of four layers.
PLACES: dict[str, dict[str, Any]] = {
    "all": {"streamed": (0, 1, 2, 3)},
    "inputs too": {"streamed": (0, 1, 2, 3), "inputs_on_host": True},
    "some": {"streamed": (1, 2), "inputs_on_host": True},
    "one": {"streamed": (3,)},
    "ends too": {"streamed": (0, 1, 2, 3), "ends_on_host": True},
    "ends alone": {"streamed": (), "ends_on_host": True},
}
SECOND: dict[str, Any] = {"criterion": "second-order"}
PASSES: dict[str, dict[str, Any]] = {
    "second-order": SECOND,
    "second-order in batches": {**SECOND, "batch_size": 2},
    "second-order of a stream": {**SECOND, "engine": "stream", "batch_tokens": 40},
    "in slices": {**SECOND, "slices": 3},
    "summed": {"criterion": "gisp", "batch_size": 2},
    "of one batch": {"criterion": "gisp", "engine": "stream", "batch_tokens": 4096},
    "signed": {"criterion": "signed", "batch_size": 2},
}


def scored(
    model: Any, data: Sequences, options: dict[str, Any], removed: str, refused: str | None, step: int = 1
) -> tuple[StepScores, GradientScorer]:
    model_map = map_model(model)
    shrinkable = ShrinkableModel(model_map)
    removal = {name: torch.tensor(index) for name, index in REMOVALS[removed].items()}
    shrinkable.remove(removal)
    stream = LayerStream.of(model)
    if stream is not None and removal:
        shrinkable.pack(in_place=True)
    config = make_config(**{"preset": "fast", "engine": "exact", "ema": 0.0, "protect_first": 0.25, **options})
    scorer = GradientScorer(Context(shrinkable, data, config))
    scorer.refused = refused
    live = [g for g in model_map.groups if shrinkable.kept(g.name) and not g.name.startswith("layers.0.")]
    return scorer.score(step, live), scorer


def assert_same(found: StepScores, expected: StepScores) -> None:
    assert torch.equal(found.loss, expected.loss) and found.tokens == expected.tokens
    assert [*found.scores] == [*expected.scores]
    for name, values in expected.scores.items():
        assert torch.equal(found.scores[name], values), name


@pytest.mark.parametrize("by", ["fused", "autograd"])
@pytest.mark.parametrize("removed", REMOVALS)
@pytest.mark.parametrize("passes", PASSES)
def test_every_pass_gives_the_same_bits(passes: str, removed: str, by: str) -> None:
    refused = None if by == "fused" else "a test says so"
    expected, resident = scored(tiny_model(), ragged(), PASSES[passes], removed, refused)
    for how in ("all", "some", "ends too"):
        model = tiny_model()
        stream = place(model, device=CPU, **PLACES[how])
        found, scorer = scored(model, ragged(), PASSES[passes], removed, refused)
        assert (scorer._fused is None) == (resident._fused is None)
        assert_same(found, expected)
        assert stream.traffic.bytes > 0


@pytest.mark.parametrize("how", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_placement_gives_the_same_bits(family: str, how: str) -> None:
    expected, _ = scored(tiny_model(family), ragged(), SECOND, "uneven", None)
    model = tiny_model(family)
    place(model, device=CPU, **PLACES[how])
    assert_same(scored(model, ragged(), SECOND, "uneven", None)[0], expected)


@pytest.mark.parametrize("objective", ["margin", "choice"])
@pytest.mark.parametrize("make", [answers, letters, mixed])
@pytest.mark.parametrize("refused", [None, "a test says so"])
def test_answers_give_the_same_bits(make: Callable[[], Sequences], objective: str, refused: str | None) -> None:
    options = {**SECOND, "objective": objective, "batch_size": 2}
    expected, _ = scored(tiny_model(), make(), options, "dense", refused)
    model = tiny_model()
    place(model, device=CPU, **PLACES["inputs too"], ends_on_host=True)
    assert_same(scored(model, make(), options, "dense", refused)[0], expected)
