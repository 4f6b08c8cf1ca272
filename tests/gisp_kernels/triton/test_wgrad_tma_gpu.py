"""The TMA kernel on a GPU that has it. ``-k sanitizer`` selects a small subset for compute-sanitizer."""

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
from gisp_kernels.ops.importance import StackedLinear, stacked_wgrad_importance
from gisp_kernels.ops.wgrad import fused_kernel, multiprocessors, plan
from gisp_kernels.triton.abs_weighted_reduce import finish
from gisp_kernels.triton.wgrad_tma import partial_sums


def has_tma() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_tma(), reason="needs a GPU with TMA")]
DTYPES = (torch.bfloat16, torch.float16)
LARGE = ((2560, 2560, 512), (1504, 3008, 17), (1536, 5200, 4097), (13824, 5120, 256), (5120, 13824, 2048))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("shape", (*SHAPES, *LARGE), ids=str)
def test_one_layer(shape, axis, block, dtype):
    check_one_layer(shape, axis, block, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_side_by_side(dtype):
    check_layers_side_by_side(dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_stay_where_they_are(dtype):
    check_infinities_stay_where_they_are(dtype, "cuda")


@pytest.mark.parametrize("axis", ["row", "column"])
def test_sanitizer(axis):
    check_one_layer((136, 264, 70), axis, 8, torch.bfloat16, "cuda")


@pytest.mark.parametrize("axis", ["row", "column"])
def test_no_bit_depends_on_the_run_or_the_number_of_programs(axis):
    dy, x, weight = (inside(*size, torch.bfloat16, "cuda") for size in ((600, 3072), (600, 4096), (3072, 4096)))
    found = []
    for programs in (1, 37, 132, 132):
        out = torch.zeros(weight.shape[0 if axis == "row" else 1], device="cuda")
        finish(out, partial_sums(dy, x, [weight], [0], axis, programs), 1)
        found.append(out)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_large_aligned_operands_take_it_and_others_do_not():
    dy, x = (torch.randn(64, n, device="cuda").bfloat16() for n in (4096, 4096))
    weight = torch.randn(4096, 4096, device="cuda").bfloat16()
    assert fused_kernel(dy, x, [weight], "row") == ("tma", 512)
    assert fused_kernel(dy[:, 1:], x, [weight[1:]], "row")[0] == "triton"
    assert fused_kernel(dy, x, [weight.float()], "row")[0] == "triton"
    assert fused_kernel(dy.float(), x.float(), [weight.float()], "row")[0] == "triton"
    assert fused_kernel(dy[:, :512], x[:, :512], [weight[:512, :512]], "row")[0] == "triton"
    assert plan(dy, x, [weight], "row") in ("tma", "native")
    assert plan(dy[:, :512], x[:, :512], [weight[:512, :512]], "row") == "triton"
    assert multiprocessors(dy.device) > 16


@pytest.mark.parametrize("tokens", [512, 8192])
def test_stacked_layers_score_what_each_scores_alone(tokens):
    extents, width = (2048, 2048, 2048), 2048
    dy, x = (torch.randn(tokens, n, device="cuda").bfloat16() for n in (sum(extents), width))
    weights = [torch.randn(rows, width, device="cuda").bfloat16() for rows in extents]
    outs = [torch.zeros(16, device="cuda") for _ in extents]
    layers = [
        StackedLinear(2048 * i, weight, 128, out) for i, (weight, out) in enumerate(zip(weights, outs, strict=True))
    ]
    stacked_wgrad_importance(dy, x, layers)
    for layer in layers:
        alone = wgrad_importance(dy[:, layer.start : layer.stop], x, layer.weight, block=128, backend="triton")
        torch.testing.assert_close(layer.out, alone, rtol=2e-3, atol=0)
