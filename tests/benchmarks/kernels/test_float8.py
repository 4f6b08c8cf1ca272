"""Implementations of 8-bit products, checked by checks that can fail."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from benchmarks.common.task import AUTO, EAGER, Prepared, checked
from benchmarks.kernels.tasks import float8


def wrong_ones(prepared: Prepared) -> dict[str, str]:
    return checked(prepared)[1]


def test_products_are_checked_against_what_rounding_costs(on_cpu: None) -> None:
    prepared = float8._prepare_product(24, 48, 64)
    assert list(prepared.implementations) == [AUTO, float8.CUBLAS] and not wrong_ones(prepared)
    assert list(prepared.parts) == ["8-bit product alone"]
    prepared.implementations = {"half": lambda x, w: x @ w.t() / 2, "shifted": lambda x, w: x @ w.t() + 0.5}
    assert wrong_ones(prepared).keys() == {"half", "shifted"}


@pytest.mark.parametrize(
    "prepare", [float8._prepare_rows, partial(float8._prepare_rows, scaled=True), float8._prepare_turned]
)
def test_rounding_is_checked_bit_for_bit(on_cpu: None, prepare: Callable[[int, int], Prepared]) -> None:
    prepared = prepare(5, 32)
    assert list(prepared.implementations) == [AUTO, EAGER] and not wrong_ones(prepared)
    right = prepared.implementations[AUTO]
    prepared.implementations = {"negated": lambda x: right(-x)}
    assert "differ" in wrong_ones(prepared)["negated"]
