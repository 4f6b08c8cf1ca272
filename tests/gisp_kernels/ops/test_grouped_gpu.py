"""Compiled grouped reductions on a GPU. ``-k sanitizer`` selects a small subset for compute-sanitizer."""

from __future__ import annotations

import pytest
import torch
from selection_oracle import assert_same_selection

from gisp_kernels.ops.grouped import ScoredMatrix, grouped_abs_weighted_reduce
from gisp_kernels.testing import Truth, assert_error_budget, reduce_truth

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Hidden size, query heads, key/value heads, head size, channels: half an 8B layer, a small one, ragged widths.
LAYERS = ((4096, 17, 8, 128, 7440), (576, 9, 3, 64, 1536), (301, 5, 5, 24, 333), (64, 1, 1, 16, 1))


def layer(shape: tuple[int, int, int, int, int], dtype: torch.dtype, grad_dtype: torch.dtype) -> list[ScoredMatrix]:
    """All matrices of a layer; its results are poison."""
    hidden, heads, kv_heads, size, channels = shape
    outs = [torch.full((count,), float("nan"), device="cuda") for count in (heads, channels)]

    def matrix(rows: int, width: int, own: int, axis: str, block: int) -> ScoredMatrix:
        weight = torch.randn(rows, width, device="cuda").to(dtype)
        return ScoredMatrix(weight, torch.randn(rows, width, device="cuda").to(grad_dtype), outs[own], axis, block)

    shared = [matrix(kv_heads * size, hidden, 0, "row", size) for _ in range(2)] if kv_heads == heads else []
    return [
        matrix(heads * size, hidden, 0, "row", size),
        *shared,
        matrix(hidden, heads * size, 0, "column", size),
        matrix(channels, hidden, 1, "row", 1),
        matrix(channels, hidden, 1, "row", 1),
        matrix(hidden, channels, 1, "column", 1),
    ]


def check(matrices: list[ScoredMatrix], power: int = 1) -> None:
    for out in {id(m.out): m.out for m in matrices}.values():
        parts = [reduce_truth(m.weight, m.grad, m.axis, m.block, power) for m in matrices if m.out is out]
        scores = torch.stack([part.scores for part in parts]).sum(0)
        truth = Truth(scores, scores, sum(part.terms for part in parts))
        assert_error_budget(out, truth.scores.float(), truth)
        if len(out) > 3:
            assert_same_selection(out, truth, len(out) // 2)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=["x".join(map(str, shape)) for shape in LAYERS])
def test_error_selection_and_repeatability(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, power: int
) -> None:
    for grad_dtype in dict.fromkeys((dtype, torch.float32)):
        matrices = layer(shape, dtype, grad_dtype)
        grouped_abs_weighted_reduce(matrices, power=power, add=False, backend="triton")
        check(matrices, power)
        first = [matrix.out.clone() for matrix in matrices]
        grouped_abs_weighted_reduce(matrices, power=power, add=False, backend="triton")
        assert all(torch.equal(matrix.out, one) for matrix, one in zip(matrices, first, strict=True))
        grouped_abs_weighted_reduce(matrices, power=power, backend="triton")
        for matrix, one in zip(matrices, first, strict=True):
            torch.testing.assert_close(matrix.out, 2 * one)


def test_experts_and_views_of_wider_rows() -> None:
    base = torch.full((2, 6, 130, 240), float("nan"), device="cuda", dtype=torch.bfloat16)
    weight, grad = base[0, :, :101, :208], base[1, :, 20:121, 16:224]
    weight.copy_(torch.randn(weight.shape))
    grad.copy_(torch.randn(grad.shape))
    lines = (weight.double() * grad.double()).abs()
    for axis, extent, expected in (("row", 101, lines.sum(2)), ("column", 208, lines.sum(1))):
        for own, other in ((weight, grad), (weight.mT.contiguous().mT, grad)):
            out = torch.full((6 * extent,), float("nan"), device="cuda")
            grouped_abs_weighted_reduce([ScoredMatrix(own, other, out, axis)], add=False, backend="triton")
            torch.testing.assert_close(out.double(), expected.flatten(), rtol=1e-5, atol=0.0)


def test_nothing_recompiles_as_widths_shrink() -> None:
    from gisp_kernels.triton import grouped_reduce as kernel

    def compiled() -> int:
        caches = [
            c for k in (kernel._grouped_sums_kernel, kernel._finish_group_kernel) for c in k.device_caches.values()
        ]
        return sum(len(cache[0]) for cache in caches)

    grouped_abs_weighted_reduce(layer((512, 4, 4, 64, 256), torch.bfloat16, torch.bfloat16), add=False)
    before = compiled()
    assert before
    for heads, channels in ((3, 240), (2, 160), (1, 16)):
        matrices = layer((512, heads, heads, 64, channels), torch.bfloat16, torch.bfloat16)
        grouped_abs_weighted_reduce(matrices, add=False)
    assert compiled() == before


def test_sanitizer() -> None:
    matrices = layer((70, 3, 3, 8, 37), torch.float32, torch.float32)
    grouped_abs_weighted_reduce(matrices, add=False, backend="triton")
    check(matrices)
