"""The TMA kernel in the interpreter."""

from __future__ import annotations

import pytest
import torch
from wgrad_cases import (
    SHAPES,
    check_infinities_stay_where_they_are,
    check_layers_side_by_side,
    check_one_layer,
    inside,
)

from gisp_kernels.ops.importance import wgrad_importance_op


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_layer(shape, axis, block):
    check_one_layer(shape, axis, block, torch.float16, "cpu")


def test_layers_side_by_side():
    check_layers_side_by_side(torch.float16, "cpu")


def test_infinities_stay_where_they_are():
    check_infinities_stay_where_they_are(torch.float16, "cpu")


def test_nothing_to_sum_adds_nothing():
    dy, x = inside(16, 8, torch.float16, "cpu"), inside(16, 0, torch.float16, "cpu")
    out = torch.ones(8)
    wgrad_importance_op([out], dy, x, [torch.zeros(8, 0).half()], [0], [1], "row", "tma")
    assert torch.equal(out, torch.ones(8))
