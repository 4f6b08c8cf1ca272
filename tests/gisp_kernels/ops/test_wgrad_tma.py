"""The TMA kernel in the interpreter, and the rule that chooses between fused kernels and cuBLAS."""

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

from gisp_kernels import wgrad_importance
from gisp_kernels.ops.importance import StackedLinear, stacked_wgrad_importance, wgrad_importance_op
from gisp_kernels.ops.wgrad import FUSED_MAX_TOKENS, fused_kernel, prefer_fused


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


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_stacked_layers_score_what_each_scores_alone(count, backend):
    x, dy = torch.randn(20, 24), torch.randn(20, 3 * 16 + 5)
    weights = [torch.randn(16, 24) for _ in range(count)]
    outs = [torch.ones(4) for _ in range(count)]
    stack = [
        StackedLinear(5 + 16 * i, weight, 4, out) for i, (weight, out) in enumerate(zip(weights, outs, strict=True))
    ]
    stacked_wgrad_importance(dy, x, stack, backend=backend)
    for layer in stack:
        alone = wgrad_importance(dy[:, layer.start : layer.stop], x, layer.weight, block=4, backend=backend)
        torch.testing.assert_close(layer.out, 1 + alone)


def test_a_stack_of_nothing_does_nothing():
    stacked_wgrad_importance(torch.randn(4, 8), torch.randn(4, 8), [])


def test_a_layer_without_rows_leaves_the_others_their_scores():
    dy, x, weight, out = torch.randn(4, 8), torch.randn(4, 6), torch.randn(8, 6), torch.zeros(8)
    stack = [StackedLinear(0, weight[:0], 1, torch.zeros(0)), StackedLinear(0, weight, 1, out)]
    stacked_wgrad_importance(dy, x, stack)
    torch.testing.assert_close(out, wgrad_importance(dy, x, weight))


def test_layers_that_do_not_fit_are_refused():
    dy, x, weight, out = torch.randn(4, 8), torch.randn(4, 6), torch.randn(8, 6), torch.zeros(8)
    for wrong, message in (
        (StackedLinear(1, weight, 1, out), r"weight must have shape \(7, 6\)"),
        (StackedLinear(0, weight[:, :5], 1, out), r"weight must have shape \(8, 6\)"),
        (StackedLinear(0, weight, 2, out), r"out must have shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            stacked_wgrad_importance(dy, x, [wrong])


def test_operands_without_a_gpu_take_no_tma():
    x = torch.randn(64, 4096).half()
    assert fused_kernel(x, x, [torch.randn(4096, 4096).half()], "row") == ("triton", 0)


@pytest.mark.parametrize(
    ("tokens", "tiles", "fused"),
    [
        (FUSED_MAX_TOKENS + 1, 0, False),
        (8192, 132, True),
        (8192, 133, False),
        (8192, 800, False),
        (8192, 2160, True),
        (32768, 2160, False),
    ],
)
def test_many_tokens_fuse_when_the_last_wave_is_full(tokens, tiles, fused):
    assert prefer_fused(tokens, torch.bfloat16, tiles=tiles, multiprocessors=132) == fused
    assert not prefer_fused(tokens, torch.float32, tiles=tiles, multiprocessors=132)
