"""The search for a size against a fine grid, on curves of the kinds that divergences have."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from gisp.compensation.size_search import search

Curve = Callable[[float], float]
# Lowest at 1 where not said otherwise, with a fall of about 1.
CURVES: dict[str, Curve] = {
    "parabola": lambda s: (s - 1) ** 2,
    "steep behind": lambda s: 1 - 1.6 * s + 0.4 * s**2 + 0.2 * s**4,
    "flat behind": lambda s: 1 - s * math.exp(1 - s),
    "limited": lambda s: (s - 2) ** 2 / 4 if s < 1 else math.inf,
    "not a number": lambda s: (s - 1) ** 2 if s < 1.3 else math.nan,
}
STARTS = (0.02, 0.3, 0.9, 1.0, 1.6, 8.0)


def searched(curve: Curve, first: float, most: float = math.inf) -> tuple[float, float, list[float]]:
    tried: list[float] = []

    def value(size: float) -> torch.Tensor:
        tried.append(size)
        return torch.tensor([0.25, curve(size) - 0.25], dtype=torch.float64)

    size, values = search(value, first, torch.tensor([curve(0.0), 0.0], dtype=torch.float64), most)
    return size, float(values.sum()), tried


@pytest.mark.parametrize("first", STARTS)
@pytest.mark.parametrize("kind", CURVES)
def test_it_comes_near_the_lowest(kind: str, first: float) -> None:
    curve = CURVES[kind]
    size, value, tried = searched(curve, first)
    lowest = min(found for k in range(1, 400) if math.isfinite(found := curve(k / 100)))
    assert value == pytest.approx(curve(size))
    # Below a limit the lowest lies at its very edge.
    assert (value - lowest) / (curve(0.0) - lowest) < (0.25 if kind == "limited" else 0.05)
    assert len(tried) == len(set(tried)) <= (5 if 0.1 < first < 2 else 12)


def test_a_parabola_is_met_in_three_values() -> None:
    size, _, tried = searched(CURVES["parabola"], 0.8)
    assert size == pytest.approx(1) and len(tried) == 3


@pytest.mark.parametrize("most", [0.1, 0.5, 0.95])
def test_no_size_is_above_the_most(most: float) -> None:
    for first in (most, most / 3):
        size, _, tried = searched(CURVES["parabola"], first, most)
        assert max(tried) <= most and size > most / 1.15


def test_a_size_below_the_most_is_found() -> None:
    size, _, tried = searched(lambda s: (s - 0.4) ** 2, 1.0, most=1.0)
    assert size == pytest.approx(0.4) and len(tried) <= 4


@pytest.mark.parametrize(
    ("curve", "trials"),
    [
        (lambda s: 1 + s + s**2, 7),
        (lambda s: 1 + s**2, 7),
        (lambda s: 2 - math.exp(-s), 12),
        (lambda s: 1.0, 12),
        (lambda s: math.inf if s else 1.0, 12),
    ],
)
def test_none_is_found_where_none_is_lower(curve: Curve, trials: int) -> None:
    size, value, tried = searched(curve, 1.0)
    assert (size, value) == (0.0, 1.0) and len(tried) == trials


@pytest.mark.parametrize("first", [1.0, 5.0])
def test_values_that_are_all_the_same_end_it(first: float) -> None:
    size, value, tried = searched(lambda s: 1.0 if s < 0.5 else 0.0, first)
    assert size and value == 0 and len(tried) <= 12


@pytest.mark.parametrize("lowest", [0.02, 0.1])
def test_a_fall_far_below_the_first_is_found(lowest: float) -> None:
    def curve(size: float) -> float:
        return 1 - 0.3 * math.log1p(3 * size / lowest) + 0.14 * (size / lowest) ** 1.5

    _, value, _ = searched(curve, 1.0, most=1.0)
    assert value < 1 - 0.9 * (1 - min(curve(lowest * k / 100) for k in range(1, 400)))
