"""The search for a size against a fine grid, on curves of the kinds that divergences have."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from gisp.compensation.acceptance import Measured
from gisp.compensation.size_search import search

Curve = Callable[[float], float]
# Lowest at 1 where not said otherwise, with a fall of about 1.
CURVES: dict[str, Curve] = {
    "parabola": lambda s: (s - 1) ** 2,
    "steep behind": lambda s: 1 - 1.6 * s + 0.4 * s**2 + 0.2 * s**4,
    "flat behind": lambda s: 1 - s * math.exp(1 - s),
    "infinite": lambda s: (s - 2) ** 2 / 4 if s < 1 else math.inf,
    "not a number": lambda s: (s - 1) ** 2 if s < 1.3 else math.nan,
}
STARTS = (0.02, 0.3, 0.9, 1.0, 1.6, 8.0)


def searched(
    curve: Curve, first: float, most: float = math.inf, excesses: tuple[Curve, ...] = (), share: float = 1.0
) -> tuple[float, float, list[float]]:
    tried: list[float] = []

    def made(size: float) -> Measured:
        divergences = torch.tensor([0.25, curve(size) - 0.25], dtype=torch.float64)
        return Measured(divergences, tuple(excess(size) for excess in excesses))

    def measure(size: float) -> Measured:
        tried.append(size)
        return made(size)

    size, found = search(measure, first, made(0.0), most, share)
    assert size == 0 or all(excess <= 0 for excess in found.excess)
    return size, float(found.divergences.sum()), tried


@pytest.mark.parametrize("first", STARTS)
@pytest.mark.parametrize("kind", CURVES)
def test_it_comes_near_the_lowest(kind: str, first: float) -> None:
    curve = CURVES[kind]
    size, value, tried = searched(curve, first)
    lowest = min(found for k in range(1, 400) if math.isfinite(found := curve(k / 100)))
    assert value == pytest.approx(curve(size))
    # Where no value tells how near the lowest is, it may be missed.
    assert (value - lowest) / (curve(0.0) - lowest) < (0.25 if kind == "infinite" else 0.05)
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
        (lambda s: 2 - math.exp(-s), 10),
        (lambda s: 1.0, 10),
        (lambda s: math.inf if s else 1.0, 10),
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


# By how much a loss is above its limit: met at a size of 1, 0.1 or 0.01.
LIMITS: dict[str, Curve] = {
    "straight": lambda s: 0.005 * (s - 1),
    "curved": lambda s: 0.005 * (s * s - 1),
    "falling first": lambda s: 0.02 * (s - 0.5) ** 2 - 0.005,
}


@pytest.mark.parametrize("edge", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("first", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", LIMITS)
def test_a_limit_is_met_from_below(kind: str, first: float, edge: float) -> None:
    limits = (lambda s: -1.0, lambda s: LIMITS[kind](s / edge))
    size, _, tried = searched(lambda s: (s - 5) ** 2, first, excesses=limits)
    assert edge / 1.5 < size <= edge
    assert len(tried) <= (10 if kind == "falling first" else 6)


def test_a_limit_without_room_is_no_guide() -> None:
    # The loss must not rise at all: size 0 is at the limit already, and a line would say that nothing is allowed.
    size, _, tried = searched(lambda s: (s - 5) ** 2, 1.0, excesses=(lambda s: s * (s - 0.2),))
    assert 0.2 / 1.5 < size <= 0.2 and len(tried) <= 8


def test_no_size_is_sought_far_below_the_first() -> None:
    size, _, tried = searched(lambda s: (s - 5) ** 2, 1.0, excesses=(lambda s: s - 1e-7,))
    assert size == 0 and len(tried) <= 5 and min(tried) >= 1e-3


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_change_takes_its_share_of_what_a_limit_leaves(share: float) -> None:
    size, _, _ = searched(
        lambda s: (s - 5) ** 2, 1.0, excesses=(lambda s: 0.004 * s - 0.002, lambda s: s - 1), share=share
    )
    assert 0.5 * share / 1.2 < size <= 0.5 * share
    # Where no limit is met, it takes what it wants.
    size, _, _ = searched(CURVES["parabola"], 0.9, excesses=(lambda s: s - 100,), share=share)
    assert size == pytest.approx(1, abs=0.1)
