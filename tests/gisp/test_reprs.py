"""What is printed of public objects stays a line, however large they are."""

from __future__ import annotations

from tiny import tiny_model, tiny_tokens

import gisp
from gisp.data import Sequences
from gisp.export.spec import PrunedSpec
from gisp.model.structures import map_model


def test_public_objects_are_a_line() -> None:
    model = tiny_model(layers=8)
    model_map = map_model(model)
    data = Sequences.plain([(row, row) for row in tiny_tokens(200, 16)])
    trajectory = gisp.prune(model, data, preset="paper", steps=3, sparsity=0.3)
    keep = trajectory.keep(3)
    for value in (trajectory, data, keep, model_map):
        assert len(repr(value)) < 120 and "\n" not in repr(value), type(value)
    assert "3 steps to sparsity 0." in repr(trajectory) and "200 of 3,200 tokens" in repr(data)
    assert repr(keep) in repr(PrunedSpec.at(trajectory, 3))
    assert f"{sum(map(len, keep.heads))} heads" in repr(keep)
