"""Reductions of several weights at once: plain torch and Triton's interpreter against float64 and the single op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interpreter import shuffled_grid
from selection_oracle import assert_same_selection

from gisp_kernels import abs_weighted_reduce
from gisp_kernels.ops.grouped import ScoredMatrix, grouped_abs_weighted_reduce
from gisp_kernels.testing import Truth, assert_error_budget, reduce_truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "triton")


def layer(dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype = torch.float32) -> list[ScoredMatrix]:
    """A layer with 3 heads of 20, of which key and value are shared, and 37 channels; results are poison."""
    heads, channels = torch.full((3,), float("nan")), torch.full((37,), float("nan"))

    def matrix(rows: int, width: int, out: torch.Tensor, axis: str, block: int) -> ScoredMatrix:
        return ScoredMatrix(
            torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(grad_dtype), out, axis, block
        )

    return [
        matrix(60, 150, heads, "row", 20),
        matrix(15, 150, heads, "row", 5),
        matrix(150, 60, heads, "column", 20),
        matrix(37, 150, channels, "row", 1),
        matrix(37, 150, channels, "row", 1),
        matrix(150, 37, channels, "column", 1),
    ]


def truth_of(matrices: list[ScoredMatrix], power: int = 1) -> Truth:
    """Float64 sums of matrices with one ``out``."""
    parts = [
        reduce_truth(w, g, m.axis, m.block if m.weight.dim() == 2 else 1, power)
        for m in matrices
        for w, g in (zip(m.weight, m.grad, strict=True) if m.weight.dim() == 3 else [(m.weight, m.grad)])
    ]
    scores, magnitude = (torch.stack([getattr(p, name) for p in parts]).sum(0) for name in ("scores", "magnitude"))
    return Truth(scores, magnitude, sum(part.terms for part in parts))


def by_out(matrices: list[ScoredMatrix]) -> list[list[ScoredMatrix]]:
    return [[m for m in matrices if m.out is out] for out in {id(m.out): m.out for m in matrices}.values()]


# Values are float32 before they are squared: one pair of dtypes shows the second power.
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "power"),
    [(dtype, grad, 1) for dtype in DTYPES for grad in (torch.float32, torch.bfloat16)]
    + [(torch.bfloat16, torch.float32, 2)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_float32_rounding_is_added(backend: str, dtype: torch.dtype, grad_dtype: torch.dtype, power: int) -> None:
    matrices = layer(dtype, grad_dtype)
    grouped_abs_weighted_reduce(matrices, power=power, add=False, backend=backend)
    for own in by_out(matrices):
        truth = truth_of(own, power)
        assert_error_budget(own[0].out, truth.scores.float(), truth)
        assert_same_selection(own[0].out, truth, len(own[0].out) // 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_added_to_or_overwritten(backend: str) -> None:
    matrices = layer()
    grouped_abs_weighted_reduce(matrices, add=False, backend=backend)
    once = [own[0].out.clone() for own in by_out(matrices)]
    for own in by_out(matrices):
        own[0].out.fill_(100.0)
    grouped_abs_weighted_reduce(matrices, backend=backend)
    for own, alone in zip(by_out(matrices), once, strict=True):
        torch.testing.assert_close(own[0].out, 100 + alone)


def test_the_reference_is_the_single_op_matrix_by_matrix() -> None:
    matrices = layer(torch.bfloat16)
    grouped_abs_weighted_reduce(matrices, add=False)
    for own in by_out(matrices):
        total = torch.zeros_like(own[0].out)
        for m in own:
            abs_weighted_reduce(m.weight, m.grad, axis=m.axis, block=m.block, out=total)
        assert torch.equal(own[0].out, total)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("block", [1, 3, 33])
def test_experts_are_numbered_one_after_another(backend: str, axis: str, block: int) -> None:
    shape = (4, 33, 50) if axis == "row" else (4, 50, 33)
    weight, grad = torch.randn(shape), torch.randn(shape)
    out = torch.full((4 * 33 // block,), float("nan"))
    grouped_abs_weighted_reduce([ScoredMatrix(weight, grad, out, axis, block)], add=False, backend=backend)
    lines = (weight * grad).abs().sum(2 if axis == "row" else 1).flatten()
    torch.testing.assert_close(out, lines.view(-1, block).sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", ["row", "column"])
def test_strided_views_and_a_slice_of_a_larger_result(backend: str, axis: str) -> None:
    storage = torch.full((2, 70, 90), float("nan"))
    views: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda s: s[:33, :21],
        lambda s: s[:33, 0:42:2],
        lambda s: s[:21, :33].t(),
        lambda s: s[2:35, 1:22],
    ]
    for view in views:
        weight, grad = view(storage[0]), view(storage[1])
        weight.copy_(torch.randn(33, 21))
        grad.copy_(torch.randn(33, 21))
        expected = abs_weighted_reduce(weight, grad, axis=axis, backend="reference")
        for other in (grad, grad.contiguous()):
            wide = torch.full((100,), float("nan"))
            out = wide[5 : 5 + 2 * len(expected) : 2]
            grouped_abs_weighted_reduce([ScoredMatrix(weight, other, out, axis)], add=False, backend=backend)
            torch.testing.assert_close(out, expected)
            assert int(wide.isnan().sum()) == 100 - len(expected)
        storage.fill_(float("nan"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_matrices_than_a_launch_takes_of_several_dtypes(backend: str) -> None:
    out = torch.full((6,), float("nan"))
    matrices = [
        ScoredMatrix(torch.randn(6, 10).to(DTYPES[n % 3]), torch.randn(6, 10).to(DTYPES[n % 2]), out) for n in range(29)
    ]
    grouped_abs_weighted_reduce(matrices, add=False, backend=backend)
    truth = truth_of(matrices)
    assert_error_budget(out, truth.scores.float(), truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_sum(backend: str) -> None:
    grouped_abs_weighted_reduce([], backend=backend)
    nothing = torch.full((4,), float("nan"))
    some = torch.full((4,), float("nan"))
    matrices = [
        ScoredMatrix(torch.randn(4, 0), torch.randn(4, 0), nothing),
        ScoredMatrix(torch.ones(4, 2), torch.ones(4, 2), some),
        ScoredMatrix(torch.randn(0, 4), torch.randn(0, 4), some, "column"),
        ScoredMatrix(torch.randn(0, 4, 2), torch.randn(0, 4, 2), torch.zeros(0)),
    ]
    grouped_abs_weighted_reduce(matrices, add=False, backend=backend)
    assert nothing.tolist() == [0.0] * 4
    assert some.tolist() == [2.0] * 4


def test_order_of_programs_changes_no_bit() -> None:
    matrices = layer()
    grouped_abs_weighted_reduce(matrices, add=False, backend="triton")
    expected = [own[0].out.clone() for own in by_out(matrices)]
    for seed in range(2):
        with shuffled_grid(seed):
            grouped_abs_weighted_reduce(matrices, add=False, backend="triton")
        assert all(torch.equal(own[0].out, one) for own, one in zip(by_out(matrices), expected, strict=True))


W, OUT = torch.zeros(4, 6), torch.zeros(4)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (ScoredMatrix(W[0], W[0], OUT), "weight must have 2 or 3 dimensions"),
        (ScoredMatrix(W, W.t(), OUT), r"grad must have shape \(4, 6\), got \(6, 4\)"),
        (ScoredMatrix(W, W, OUT, "rows"), "axis must be 'row' or 'column', got 'rows'"),
        (ScoredMatrix(W, W, OUT, block=3), "block 3 does not divide the 4 rows"),
        (ScoredMatrix(W, W, OUT, "column"), r"out must have shape \(6,\), got \(4,\)"),
        (ScoredMatrix(W.expand(3, 4, 6), W.expand(3, 4, 6), OUT), r"out must have shape \(12,\)"),
    ],
)
def test_matrices_that_do_not_fit(matrix: ScoredMatrix, message: str) -> None:
    good = ScoredMatrix(W, W, torch.full((4,), 7.0))
    with pytest.raises(ValueError, match=message):
        grouped_abs_weighted_reduce([good, matrix])
    assert good.out.tolist() == [7.0] * 4
    with pytest.raises(ValueError, match="power must be 1 or 2"):
        grouped_abs_weighted_reduce([good], power=3)
