"""8-bit products on a GPU: rounding bit for bit, products against what rounding alone costs, nothing recompiled."""

from __future__ import annotations

import pytest
import torch

from gisp_kernels.ops import float8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < float8.CAPABILITY,
        reason="needs 8-bit tensor cores",
    ),
]
SHAPES = [(8192, 5120), (13824, 5120), (5120, 13824), (2048, 27648), (300, 1040), (17, 77), (1, 16)]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of different size, a prefix of wider ones."""
    size = torch.logspace(-4, 2, rows, device="cuda")[:, None]
    return (torch.randn(rows, columns + 16, device="cuda") * size).to(dtype)[:, :columns]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_have_the_bits_of_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, column = matrix(*shape, dtype), torch.rand(shape[1], device="cuda")
    for given in (None, column):
        expected, scale = float8.quantize_rows(x, given, backend="reference")
        found, found_scale = float8.quantize_rows(x, given, backend="triton")
        assert torch.equal(found_scale, scale)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    expected, scale = float8.quantize_rows(x, backend="reference")
    turned = float8.quantize_transposed(x, scale, backend="triton")
    assert torch.equal(turned.view(torch.uint8), expected.view(torch.uint8).t())


def test_rows_that_are_not_finite_hold_nan():
    x = torch.randn(4, 5000, device="cuda", dtype=torch.bfloat16)
    x[1, 4321], x[2, 7] = float("nan"), float("inf")
    q, _ = float8.quantize_rows(x, backend="triton")
    assert q.float().isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("shape", [(8192, 13824, 5120), (8192, 5120, 7184), (304, 48, 1040), (33, 64, 128)], ids=str)
def test_products_add_little_to_what_rounding_costs(shape):
    tokens, out, inner = shape
    x, w = matrix(tokens, inner), matrix(out, inner)
    truth = x.double() @ w.double().t()
    (xq, xs), (wq, ws) = float8.quantize_rows(x), float8.quantize_rows(w)
    rounded = (xq.double() * xs.double()[:, None]) @ (wq.double() * ws.double()[:, None]).t()
    found = float8.scaled_product(xq, xs, wq, ws, torch.bfloat16)
    # Rows and columns have their own size: each element counts relative to them.
    size = x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)
    cost = ((rounded - truth) / size).norm()
    assert ((found.double() - truth) / size).norm() <= 1.25 * cost
    alone = float8.scaled_product(xq, xs, wq, None, torch.bfloat16)
    assert ((alone.double() * ws - found.double()) / size).norm() <= 0.25 * cost
    assert torch.equal(float8.scaled_product(xq, xs, wq, ws, torch.bfloat16), found)


def test_nothing_recompiles_while_a_model_shrinks():
    from gisp_kernels.triton import float8 as kernels

    def run(tokens: int, width: int) -> None:
        x = torch.ones(tokens, width, device="cuda", dtype=torch.bfloat16)
        _, scale = float8.quantize_rows(x)
        float8.quantize_rows(x, scale.new_ones(width))
        float8.quantize_transposed(x, scale)

    def variants() -> int:
        both = (kernels._quantize_rows_kernel, kernels._quantize_transposed_kernel)
        return sum(len(caches[0]) for kernel in both for caches in kernel.device_caches.values())

    # A layer has rows of both kinds from the start.
    for tokens, width in ((64, 1024), (64, 1008), (63, 1023), (1, 1), (64, 13824), (63, 13823)):
        run(tokens, width)
    compiled = variants()
    assert compiled > 0
    for tokens, width in ((32, 992), (640, 13808), (16, 16), (7, 13817)):
        run(tokens, width)
    assert variants() == compiled
