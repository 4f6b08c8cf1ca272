"""Scores in original numbering and their moving average."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from gisp.errors import GispError
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.score.average import ScoreAverage, in_original_numbering

CPU = torch.device("cpu")


def test_scores_by_position_return_to_their_structures():
    shrinkable = ShrinkableModel(map_model(tiny_model()))
    counts = {group.name: group.count for group in shrinkable.map.groups}
    size = sum(counts.values())
    shrinkable.remove({"layers.1.heads": torch.tensor([0, 2]), "layers.2.channels": torch.tensor([3, 1, 22])})
    shrinkable.remove({"layers.1.heads": torch.tensor([1]), "layers.2.channels": torch.tensor([0, 23])})
    scores = {name: torch.rand(shrinkable.kept(name)) for name in counts if name != "layers.3.heads"}
    spread = dict(zip(counts, in_original_numbering(scores, shrinkable, size).split([*counts.values()]), strict=True))
    for name, values in spread.items():
        expected = torch.zeros(counts[name])
        if name in scores:
            expected[shrinkable.order(name)] = scores[name]
        assert torch.equal(values, expected)
    assert not in_original_numbering({}, shrinkable, size).any()


def test_the_average_is_the_debiased_moving_average_of_every_structure():
    groups = map_model(tiny_model()).groups
    averaged = {group.name for group in groups[:-1]}
    average = ScoreAverage(groups, averaged, 0.8, CPU)
    history = [torch.rand(4 * 4 + 4 * 24) for _ in range(4)]
    for step, scores in enumerate(history, start=1):
        got = average.update(scores, step)
        weights = torch.tensor([0.2 * 0.8 ** (step - t) for t in range(1, step + 1)], dtype=torch.float64)
        expected = (torch.stack(history[:step]).double() * weights[:, None]).sum(0) / weights.sum()
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    state = average.state(average.average)
    assert state.keys() == averaged
    again = ScoreAverage(groups, averaged, 0.8, CPU)
    again.load(state)
    one, other = average.update(history[0], 5), again.update(history[0], 5)
    assert torch.equal(one[:-24], other[:-24])
    with pytest.raises(GispError, match=r"holds layers.0.heads \(5,\)"):
        again.load({"layers.0.heads": torch.zeros(5)})


def test_without_weight_nothing_is_averaged_or_kept():
    average = ScoreAverage(map_model(tiny_model()).groups, {"layers.0.heads"}, 0.0, CPU)
    scores = torch.rand(4 * 4 + 4 * 24)
    average.update(scores, 1)
    assert torch.equal(average.update(scores, 2), scores)
    assert average.state(average.average) == {}
