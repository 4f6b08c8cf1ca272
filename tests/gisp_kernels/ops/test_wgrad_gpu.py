"""The compiled Hopper kernel on a GPU that has it. ``-k sanitizer`` selects a small subset for compute-sanitizer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from wgrad_cases import (
    SHAPES,
    check_infinities_stay_where_they_are,
    check_layers_side_by_side,
    check_one_layer,
    inside,
)

from gisp_kernels import _ext, wgrad_importance
from gisp_kernels.ops.importance import StackedLinear, stacked_wgrad_importance
from gisp_kernels.ops.wgrad import native_partial_sums, native_why_not, plan
from gisp_kernels.triton.abs_weighted_reduce import finish


def usable() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 and _ext.has_sm90()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not usable(), reason="needs a Hopper GPU and its compiled kernel")]
DTYPES = (torch.bfloat16, torch.float16)
LARGE = ((2560, 2560, 512), (1504, 3008, 17), (1536, 5200, 4097), (13824, 5120, 256), (5120, 13824, 2048))
# Multiples of nothing but what their row strides need.
ODD = ((100, 72, 65), (101, 777, 33), (129, 257, 64), (127, 255, 63))


def poisoned_sums(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    starts: Sequence[int],
    axis: str,
    programs: int,
) -> torch.Tensor:
    """Sums in a workspace that held NaN: the allocator hands out again what was freed last."""
    kept = 0 if axis == "row" else 1
    width = (input if axis == "row" else grad_output).shape[1]
    rows = sum(weight.shape[kept] for weight in weights)
    torch.full((-(-width // 256), rows), float("nan"), device=input.device)
    assert native_why_not(grad_output, input, weights) is None
    return native_partial_sums(grad_output, input, weights, starts, axis, programs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("shape", (*SHAPES, *LARGE), ids=str)
def test_one_layer(shape: tuple[int, int, int], axis: str, block: int, dtype: torch.dtype) -> None:
    check_one_layer(shape, axis, block, dtype, "cuda", poisoned_sums)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_extents(shape: tuple[int, int, int], axis: str) -> None:
    rows, width, tokens = shape

    def aligned(height: int, breadth: int) -> torch.Tensor:
        whole = torch.full((height + 1, -(-breadth // 8) * 8), float("nan"), device="cuda", dtype=torch.bfloat16)
        whole[:height, :breadth] = torch.randn(height, breadth, device="cuda")
        return whole[:height, :breadth]

    dy, x, weight = aligned(tokens, rows), aligned(tokens, width), aligned(rows, width)
    found = wgrad_importance(dy, x, weight, axis=axis, backend="native")
    wanted = wgrad_importance(dy, x, weight, axis=axis, backend="reference")
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_block_128(axis: str) -> None:
    check_one_layer((1280, 1280, 200), axis, 128, torch.bfloat16, "cuda", poisoned_sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_side_by_side(dtype: torch.dtype) -> None:
    check_layers_side_by_side(dtype, "cuda", poisoned_sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_stay_where_they_are(dtype: torch.dtype) -> None:
    check_infinities_stay_where_they_are(dtype, "cuda", poisoned_sums)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_sanitizer(axis: str) -> None:
    check_one_layer((136, 264, 70), axis, 8, torch.bfloat16, "cuda", poisoned_sums)
    check_one_layer((392, 776, 129), axis, 8, torch.float16, "cuda", poisoned_sums)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_no_bit_depends_on_the_run_or_the_number_of_programs(axis: str) -> None:
    dy, x, weight = (inside(*size, torch.bfloat16, "cuda") for size in ((600, 3072), (600, 4096), (3072, 4096)))
    found = []
    for programs in (1, 37, 132, 132, 132):
        out = torch.zeros(weight.shape[0 if axis == "row" else 1], device="cuda")
        finish(out, poisoned_sums(dy, x, [weight], [0], axis, programs), 1)
        found.append(out)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_runs_on_the_callers_stream_and_in_a_graph() -> None:
    dy, x = (torch.randn(256, n, device="cuda").bfloat16() for n in (2048, 2048))
    weight = torch.randn(2048, 2048, device="cuda").bfloat16()
    wanted = wgrad_importance(dy, x, weight, backend="native")
    out = torch.zeros(2048, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wgrad_importance(dy, x, weight, out=out, backend="native")
    assert not out.any()
    graph.replay()
    assert torch.equal(out, wanted)


def test_automatic_choice_and_refusals() -> None:
    dy, x = (torch.randn(64, n, device="cuda").bfloat16() for n in (4096, 4096))
    weight = torch.randn(4096, 4096, device="cuda").bfloat16()
    assert plan(dy, x, [weight], "row") == "native"
    assert torch.equal(wgrad_importance(dy, x, weight), wgrad_importance(dy, x, weight, backend="native"))
    for operands, reason in (
        ((dy.float(), x.float(), weight.float()), "bfloat16"),
        ((dy, x, weight.half()), "bfloat16, float16"),
        ((dy[:, 1:], x, weight[1:]), "16 bytes"),
    ):
        with pytest.raises(RuntimeError, match=f"backend 'native' cannot run here: .*{reason}"):
            wgrad_importance(*operands, backend="native")


def test_stacked_layers_score_what_each_scores_alone() -> None:
    extents, width = (2048, 1024, 1024, 512), 2048
    dy, x = (torch.randn(512, n, device="cuda").bfloat16() for n in (sum(extents), width))
    weights = [torch.randn(rows, width, device="cuda").bfloat16() for rows in extents]
    starts = [sum(extents[:i]) for i in range(4)]
    layers = [
        StackedLinear(start, weight, 128, torch.zeros(weight.shape[0] // 128, device="cuda"))
        for start, weight in zip(starts, weights, strict=True)
    ]
    assert plan(dy, x, weights, "row") == "native"
    stacked_wgrad_importance(dy, x, layers)
    for layer in layers:
        own = dy[:, layer.start : layer.stop]
        assert torch.equal(layer.out, wgrad_importance(own, x, layer.weight, block=128, backend="native"))
