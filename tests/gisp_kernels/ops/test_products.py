"""Products over tokens against float64."""

from __future__ import annotations

import pytest
import torch

from gisp_kernels.ops import products
from gisp_kernels.ops.products import add_exact_product, add_product, linear_in_float32, product_total
from gisp_kernels.testing import product

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("left", DTYPES)
@pytest.mark.parametrize("right", DTYPES)
def test_products_lose_nothing(left: torch.dtype, right: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(257, 19).to(left), torch.randn(257, 33).to(right)
    wanted = a.double().T @ b.double()
    assert torch.allclose(product(a, b).double(), wanted, atol=1e-4)
    total = product_total(19, 33, a.device)
    for part in (slice(0, 100), slice(100, 101), slice(101, 257)):
        add_product(total, a[part], b[part])
    assert total.dtype == torch.float32 and torch.allclose(total.double(), wanted, atol=1e-4)


def test_strided_tokens() -> None:
    a = torch.randn(32, 40)[:, 3:20]
    assert torch.allclose(product(a, a), a.T @ a, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 64, 300])
@pytest.mark.parametrize("right", DTYPES)
@pytest.mark.parametrize("left", ["float32", "same"])
def test_exact_products(left: str, right: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_EXACT_TOKENS", 64)
    torch.manual_seed(0)
    b = torch.randn(tokens, 33).to(right)
    a = torch.randn(tokens, 19) if left == "float32" else torch.randn(tokens, 19).to(right)
    total = torch.ones(19, 33, dtype=torch.float64)
    add_exact_product(total, a, b)
    wanted = 1 + a.double().T @ b.double()
    # Two halves of bfloat16 hold 17 bits.
    few = 2.0**-17 if left == "float32" and right == torch.bfloat16 else 2.0**-21
    scale = a.double().abs().T @ b.double().abs()
    assert bool(((total - wanted).abs() <= few * (1 + scale)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_before_it_is_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(50, 19).to(dtype), torch.randn(33, 19).to(dtype)
    found = linear_in_float32(x, weight)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), x.double() @ weight.double().T, atol=1e-5)
