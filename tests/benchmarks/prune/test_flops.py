"""The count of operations."""

from __future__ import annotations

import pytest

from benchmarks.common.registry import MODELS, Model
from benchmarks.prune.flops import Widths, pass_flops

TINY = MODELS["tiny"]


def test_every_product_of_a_pass_is_counted() -> None:
    model = Model(layers=3, hidden=10, heads=4, kv_heads=4, head_dim=2, channels=6, vocabulary=50)
    head, attention, mlp = 2 * 7 * 10 * 50, 2 * 7 * 10 * 8, 2 * 7 * 10 * 6
    every = pass_flops(model, [Widths(4, 6)] * 3, tokens=7)
    assert every.forward == head + 3 * (4 * attention + 3 * mlp)
    # The lowest layer needs the gradient of what o reads, and of the whole MLP, but not of what q, k and v read.
    assert every.input_grad == head + 2 * (4 * attention + 3 * mlp) + attention + 3 * mlp
    assert every.weight_grad == 3 * (4 * attention + 3 * mlp)
    assert every.total == every.forward + every.input_grad + every.weight_grad


def test_unscored_layers_cost_less() -> None:
    model = Model(layers=4, hidden=10, heads=4, kv_heads=2, head_dim=2, channels=6, vocabulary=50)
    head, query, key, mlp = 2 * 7 * 10 * 50, 2 * 7 * 10 * 8, 2 * 7 * 10 * 4, 2 * 7 * 10 * 6
    layer = 2 * query + 2 * key + 3 * mlp
    layers = [Widths(4, 6, scored=False), Widths(4, 6), Widths(4, 6), Widths(4, 6, scored=False)]
    found = pass_flops(model, layers, tokens=7)
    assert found.forward == head + 4 * layer
    # Nothing below the lowest scored layer, everything through the protected last one.
    assert found.input_grad == head + 2 * layer + query + 3 * mlp
    # k and v are shared: they are not scored.
    assert found.weight_grad == 2 * (2 * query + 3 * mlp)


@pytest.mark.parametrize(
    ("lowest", "input_products", "weight_products"),
    [(Widths(0, 6), (0, 1), (0, 3)), (Widths(4, 0), (1, 0), (4, 0)), (Widths(2, 3), (0.5, 1.5), (2, 1.5))],
    ids=["channels alone", "heads alone", "half"],
)
def test_empty_blocks_of_the_lowest_layer(
    lowest: Widths, input_products: tuple[float, float], weight_products: tuple[float, float]
) -> None:
    model = Model(layers=1, hidden=10, heads=4, kv_heads=4, head_dim=2, channels=6, vocabulary=50)
    head, attention, mlp = 2 * 7 * 10 * 50, 2 * 7 * 10 * 8, 2 * 7 * 10 * 6
    found = pass_flops(model, [lowest], tokens=7)
    assert found.input_grad == head + input_products[0] * attention + input_products[1] * mlp
    assert found.weight_grad == weight_products[0] * attention + weight_products[1] * mlp


def test_nothing_scored_needs_no_backward() -> None:
    found = pass_flops(TINY, [Widths(4, 128, scored=False)] * 4, tokens=8)
    assert found.input_grad == found.weight_grad == 0 < found.forward


def test_dense_pass_of_the_13b_stays_below_six_operations_per_parameter() -> None:
    model = MODELS["llama-2-13b"]
    layers = [Widths(40, 13824, scored=4 <= i < 39) for i in range(40)]
    per_token = pass_flops(model, layers, 8192).total / 8192
    parameters = 40 * (4 * 5120 * 5120 + 3 * 5120 * 13824) + 5120 * 32000
    assert 5.4 < per_token / parameters < 5.6
