"""Products over tokens against float64."""

from __future__ import annotations

import pytest
import torch

from gisp_kernels.ops.products import add_product, product_total
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
