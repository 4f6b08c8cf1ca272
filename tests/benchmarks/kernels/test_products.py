"""Implementations of products over tokens."""

from __future__ import annotations

from task_cases import right_ones

from benchmarks.common.task import AUTO, checked
from benchmarks.kernels.tasks import products


def test_products_are_right_and_one_without_a_token_is_not_timed(on_cpu: None) -> None:
    prepared = products._prepare(33, 48, 17)
    assert right_ones(prepared) == [AUTO, products.FLOAT32] and prepared.flops == 2 * 33 * 48 * 17
    prepared.implementations = {"short": lambda x, g: products.product_float32(x[1:], g[1:])}
    assert checked(prepared)[0] == {}
    assert len(products.tasks(False)) == 8 and len(products.tasks(True)) == 2
