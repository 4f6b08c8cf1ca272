"""Which step a sparsity names, and which sparsities lie beyond a run."""

from __future__ import annotations

import pytest

from gisp.errors import GispError
from gisp.select.schedule import goal_of, nearest_step

POINTS = [0.0, 0.1, 0.25, 0.5]


@pytest.mark.parametrize(
    ("sparsity", "step"),
    [(0, 0), (0.04, 0), (0.05, 0), (0.06, 1), (0.1, 1), (0.2, 2), (0.375, 2), (0.38, 3), (0.5, 3), (0.625, 3)],
)
def test_the_nearest_step_and_the_smaller_of_two(sparsity: float, step: int) -> None:
    assert nearest_step(POINTS, sparsity) == step


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan"), "half", None])
def test_no_sparsity_is_refused(sparsity: object) -> None:
    with pytest.raises(GispError, match=r"give a value in \[0, 1\)"):
        nearest_step(POINTS, sparsity)


@pytest.mark.parametrize(
    ("points", "sparsity"), [(POINTS, 0.626), (POINTS, 0.9), ([0.0, 0.2, 0.4, 0.4], 0.51), ([0.0], 0.1)]
)
def test_more_than_half_the_last_step_beyond_the_end_is_refused(points: list[float], sparsity: float) -> None:
    with pytest.raises(GispError, match=rf"is {sparsity}, the run ends at {points[-1]:.4f}: .* prune again with"):
        nearest_step(points, sparsity)


def test_a_last_step_that_removes_nothing_is_not_the_last() -> None:
    assert nearest_step([0.0, 0.2, 0.4, 0.4], 0.49) == 2


def test_the_goal_of_a_finished_run_names_its_end() -> None:
    config = {"sparsity": 0.7, "steps": 3, "regrow": 0}
    assert goal_of(config, 3) == 0.7
    assert nearest_step(POINTS, 0.7, goal=0.7) == 3
    with pytest.raises(GispError, match="ends at"):
        nearest_step(POINTS, 0.69, goal=0.7)
    # A run that was cut, or asked for a ratio, has none.
    assert goal_of(config, 2) is None
    assert goal_of({**config, "regrow": 2}, 4) is None and goal_of({**config, "regrow": 2}, 5) == 0.7
    assert goal_of({**config, "sparsity": None}, 3) is None
    # One that nobody checked.
    assert goal_of({**config, "steps": [3]}, 3) is None is goal_of({**config, "regrow": "2"}, 3)
    assert goal_of({**config, "steps": {"a": 1}}, 3) is None is goal_of({**config, "sparsity": "0.7"}, 3)
