"""Compiled importance kernels on a GPU. ``-k sanitizer`` selects a small subset for compute-sanitizer."""

from __future__ import annotations

import pytest
import torch
from selection_oracle import assert_same_selection

from gisp_kernels import abs_weighted_reduce, wgrad_importance
from gisp_kernels.ops.importance import wgrad_importance_op
from gisp_kernels.ops.products import weight_grad
from gisp_kernels.ops.wgrad import FUSED_MAX_TOKENS
from gisp_kernels.testing import assert_error_budget, reduce_truth, wgrad_truth

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows, columns, tokens, block.
SHAPES = (
    (512, 1024, 512, 128),
    (2048, 4096, 300, 1),
    (1792, 4096, 2048, 128),
    (33, 70, 17, 1),
    (257, 1000, 129, 1),
    (1000, 3457, 511, 8),
    (1, 1, 1, 1),
    (64, 64, 1, 64),
    (900, 200, 40, 300),
)
IDS = ["x".join(map(str, shape)) for shape in SHAPES]


@pytest.fixture(autouse=True)
def full_float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def operands(rows: int, width: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    shapes = ((tokens, rows), (tokens, width), (rows, width))
    return tuple(torch.randn(shape, device="cuda").to(dtype) for shape in shapes)


def block_for(shape: tuple[int, int, int, int], axis: str) -> int:
    extent = shape[0 if axis == "row" else 1]
    return shape[3] if extent % shape[3] == 0 else 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_reduce(shape: tuple[int, int, int, int], axis: str, dtype: torch.dtype) -> None:
    rows, width, _, _ = shape
    block = block_for(shape, axis)
    for grad_dtype in (dtype, torch.float32):
        weight = torch.randn(rows, width, device="cuda").to(dtype)
        grad = torch.randn(rows, width, device="cuda").to(grad_dtype)
        truth = reduce_truth(weight, grad, axis, block)
        scores = abs_weighted_reduce(weight, grad, axis=axis, block=block, backend="triton")
        assert_error_budget(scores, truth.scores.float(), truth)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_second_power(shape: tuple[int, int, int, int], axis: str) -> None:
    dy, x, weight = operands(*shape[:3], torch.bfloat16)
    block = block_for(shape, axis)
    grad = weight_grad(dy, x)
    truth = reduce_truth(weight, grad, axis, block, power=2)
    for scores in (
        abs_weighted_reduce(weight, grad, axis=axis, block=block, power=2),
        wgrad_importance(dy, x, weight, axis=axis, block=block, power=2),
    ):
        assert_error_budget(scores, truth.scores.float(), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_fused(shape: tuple[int, int, int, int], axis: str, dtype: torch.dtype) -> None:
    dy, x, weight = operands(*shape[:3], dtype)
    block = block_for(shape, axis)
    truth = wgrad_truth(dy, x, weight, axis, block)
    scores = wgrad_importance(dy, x, weight, axis=axis, block=block, backend="triton")
    assert_error_budget(scores, truth.scores.float(), truth)
    if scores.numel() > 3:
        assert_same_selection(scores, truth, scores.numel() // 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_products_count_every_token(dtype: torch.dtype) -> None:
    """cuBLAS drops the last of 4097 or 8193 tokens of a 16-bit product of this shape; the padding must not let it."""
    for tokens in (4096, 4097, 8193):
        dy, x, _ = operands(256, 512, tokens, dtype)
        truth = dy.double().T @ x.double()
        scale = dy.double().abs().T @ x.double().abs()
        error = (weight_grad(dy, x).double() - truth).abs()
        eps, accumulation = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
        # Roundings of a few partial sums to the working dtype, each about sqrt(tokens) of the terms, and float32 sums.
        allowed = 4 * eps * truth.abs() + (eps / tokens**0.5 + accumulation) * scale
        excess = float((error - allowed).max())
        assert excess <= 0, f"{tokens} tokens: error exceeds what rounding explains by {excess}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [64, FUSED_MAX_TOKENS + 1], ids=["fused", "cublas"])
def test_auto_is_no_worse_than_plain_torch(tokens: int, dtype: torch.dtype) -> None:
    for rows, width in ((256, 512), (255, 509)):
        dy, x, weight = operands(rows, width, tokens, dtype)
        for axis in ("row", "column"):
            truth = wgrad_truth(dy, x, weight, axis, 1)
            reference = wgrad_importance(dy, x, weight, axis=axis, backend="reference")
            assert_error_budget(wgrad_importance(dy, x, weight, axis=axis), reference, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views(dtype: torch.dtype) -> None:
    storage = torch.randn(3, 700, 900, device="cuda").to(dtype)
    for view in (
        lambda s: s[:333, :210],
        lambda s: s[:333, 0:420:2],
        lambda s: s[:210, :333].t(),
        lambda s: s[2:335, 1:211],
        lambda s: s[:320, :208],
    ):
        weight, grad = view(storage[0]), view(storage[1])
        rows, width = weight.shape
        tokens = {
            "plain": (storage[2][:300, :rows], storage[1][:300, 3 : 3 + width]),
            "transposed": (storage[2].t()[:500, :rows], storage[1].t()[:500, :width]),
            "expanded": (storage[2][0, 0].expand(64, rows), storage[1][:64, :width]),
        }
        for axis in ("row", "column"):
            truth = reduce_truth(weight, grad, axis, 1)
            scores = abs_weighted_reduce(weight, grad, axis=axis, backend="triton")
            assert_error_budget(scores, truth.scores.float(), truth)
            for dy, x in tokens.values():
                truth = wgrad_truth(dy, x, weight, axis, 1)
                scores = wgrad_importance(dy, x, weight, axis=axis, backend="triton")
                assert_error_budget(scores, truth.scores.float(), truth)


@pytest.mark.parametrize(("rows", "width", "tokens"), [(0, 64, 8), (64, 0, 8), (64, 48, 0), (0, 0, 0)])
def test_empty_shapes_score_zero(rows: int, width: int, tokens: int) -> None:
    for dtype in DTYPES:
        dy, x, weight = operands(rows, width, tokens, dtype)
        for axis, count in (("row", rows), ("column", width)):
            zeros = torch.zeros(count, device="cuda")
            for backend in ("triton", None):
                assert torch.equal(wgrad_importance(dy, x, weight, axis=axis, backend=backend), zeros)
            assert torch.equal(abs_weighted_reduce(weight, weight * 0, axis=axis, backend="triton"), zeros)


@pytest.mark.parametrize("tokens", [777, FUSED_MAX_TOKENS + 1], ids=["fused", "cublas"])
def test_repeats_are_bit_identical(tokens: int) -> None:
    dy, x, weight = operands(1152, 2064, tokens, torch.bfloat16)
    for axis in ("row", "column"):
        fused = wgrad_importance(dy, x, weight, axis=axis, block=16)
        reduced = abs_weighted_reduce(weight, weight, axis=axis, block=16)
        for _ in range(10):
            assert torch.equal(wgrad_importance(dy, x, weight, axis=axis, block=16), fused)
            assert torch.equal(abs_weighted_reduce(weight, weight, axis=axis, block=16), reduced)


def test_out_is_added_to() -> None:
    dy, x, weight = operands(96, 130, 65, torch.bfloat16)
    once = wgrad_importance(dy, x, weight, block=3, backend="triton")
    storage = torch.full((64,), 1000.0, device="cuda")
    out = storage[::2]
    assert wgrad_importance(dy, x, weight, block=3, out=out, backend="triton") is out
    assert torch.equal(out, once + 1000)
    assert torch.equal(storage[1::2], torch.full((32,), 1000.0, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_reach_exactly_their_structures(dtype: torch.dtype) -> None:
    dy, x, weight = operands(200, 333, 70, dtype)
    x.abs_().add_(1)
    weight.abs_().add_(1)
    dy[2, 7] = float("nan")
    dy[3, 110] = float("inf")
    scores = wgrad_importance(dy, x, weight, backend="triton")
    assert scores.isnan().nonzero().flatten().tolist() == [7]
    assert scores.isinf().nonzero().flatten().tolist() == [110]
    assert wgrad_importance(dy, x, weight, axis="column", backend="triton").isnan().all()


def test_gradient_is_never_stored() -> None:
    rows, width, tokens = 4096, 4096, 256
    dy, x, weight = operands(rows, width, tokens, torch.bfloat16)
    out = torch.zeros(rows, device="cuda")
    wgrad_importance(dy, x, weight, out=out, backend="triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    wgrad_importance(dy, x, weight, out=out, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < rows * width * 2 // 16


def test_shrinking_widths_compile_nothing_new() -> None:
    from gisp_kernels.triton import abs_weighted_reduce as reduction
    from gisp_kernels.triton import wgrad_importance as fused

    kernels = (
        fused._wgrad_importance_kernel,
        reduction._sum_rows_kernel,
        reduction._sum_columns_kernel,
        reduction._finish_kernel,
    )

    def run(width: int, tokens: int) -> None:
        # A shrinking MLP: rows of gate and up as prefixes, columns of down as a prefix of wider storage.
        dy, x, weight = operands(width, 4096, tokens, torch.bfloat16)
        down = torch.randn(4096, 14336, device="cuda").bfloat16()[:, :width]
        for backend in ("triton", None):
            wgrad_importance(dy, x, weight, backend=backend)
            wgrad_importance(x, dy, down, axis="column", backend=backend)
        wgrad_importance_op([torch.zeros(width, device="cuda")], dy, x, [weight], [0], [1], "row", "matmul")
        abs_weighted_reduce(weight, weight)
        abs_weighted_reduce(down, down.contiguous(), axis="column")

    def variants() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    for width, tokens in ((8192, 64), (8191, 64), (16, 64), (1, 64), (48, 1)):
        run(width, tokens)
    compiled = variants()
    assert compiled > 0
    for width, tokens in ((8190, 65), (7777, 100), (7008, 512), (4097, 63), (3456, 33), (33, 2), (17, 1), (2, 7)):
        run(width, tokens)
    assert variants() == compiled


@pytest.mark.parametrize("axis", ["row", "column"])
def test_sanitizer_subset(axis: str) -> None:
    for dtype in DTYPES:
        for rows, width, tokens in ((33, 70, 17), (129, 65, 66), (64, 64, 64), (1, 600, 3)):
            dy, x, weight = operands(rows, width, tokens, dtype)
            truth = wgrad_truth(dy, x, weight, axis, 1)
            scores = wgrad_importance(dy, x, weight, axis=axis, backend="triton")
            assert_error_budget(scores, truth.scores.float(), truth)
            truth = reduce_truth(weight, weight, axis, 1)
            scores = abs_weighted_reduce(weight[:, :], weight, axis=axis, backend="triton")
            assert_error_budget(scores, truth.scores.float(), truth)
