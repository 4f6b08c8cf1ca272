"""Products over tokens on a GPU: 16-bit factors, float32 sums, no token left out."""

from __future__ import annotations

import pytest
import torch

from gisp.model.modes import exact_products
from gisp_kernels.ops.products import add_exact_product, add_product, linear_in_float32, product_total
from gisp_kernels.testing import product

pytestmark = pytest.mark.gpu

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("tokens", [1, 16, 255, 4096, 4097, 4098])
@pytest.mark.parametrize(("rows", "columns"), [(256, 512), (384, 100), (17, 33)])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16)])
def test_products_are_as_good_as_in_float32(
    tokens: int, rows: int, columns: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    torch.manual_seed(tokens + rows)
    a = torch.randn(tokens, rows, device="cuda").to(dtypes[0])
    b = torch.randn(tokens, columns, device="cuda").to(dtypes[1])
    wanted = a.double().T @ b.double()
    with exact_products():
        plain = (a.float().T @ b.float()).double()
        found = product(a, b).double()
        total = product_total(rows, columns, a.device)
        add_product(total, a, b)
        add_product(total, a, b)
    error, allowed = (found - wanted).abs().max(), (plain - wanted).abs().max()
    # Tensor cores sum in another order, and drop a few low bits where they align a sum's terms.
    assert float(error) <= 8 * float(allowed) + 1e-5 * tokens**0.5
    assert torch.allclose(total[:rows, :columns].double(), 2 * wanted, atol=2 * float(error) + 1e-5 * tokens**0.5)
    assert not total[rows:].any() and not total[:, columns:].any()
    assert torch.equal(product(a, b), product(a, b))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("columns", [512, 333])
def test_a_part_of_a_total_takes_its_product_alone(dtype: torch.dtype, columns: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4098, columns, device="cuda").to(dtype)
    part = slice(64, columns)
    whole, total = (product_total(columns, columns, x.device) for _ in range(2))
    with exact_products():
        for _ in range(2):
            add_product(whole, x, x)
            add_product(total[64:, :], x[:, part], x)
            add_product(total[:64, :64], x[:, :64], x[:, :64])
    assert torch.allclose(total.tril(), whole.tril(), atol=1e-5 * 2 * 4098**0.5, rtol=1e-4)
    assert not total[:64, 64:].any() and not total[columns:].any()


@pytest.mark.parametrize("left", [BF16, F32])
@pytest.mark.parametrize("columns", [512, 333])
def test_exact_products_of_many_tokens(left: torch.dtype, columns: int) -> None:
    """Sums of squares, where what tensor cores drop adds up."""
    torch.manual_seed(0)
    x = torch.randn(16384, columns, device="cuda").to(BF16)
    r = x if left == BF16 else x.float() * (1 + 1e-3 * torch.randn(16384, columns, device="cuda"))
    wanted = r.double().T @ x.double()
    total = torch.zeros(columns, columns, dtype=torch.float64, device="cuda")
    add_exact_product(total, r, x)
    with exact_products():
        plain = (r.float().T @ x.float()).double()
    found, allowed = (((t - wanted).diagonal() / wanted.diagonal()).abs().max() for t in (total, plain))
    assert float(found) <= max(float(allowed), 2.0**-16)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("width", [512, 333])
def test_a_product_before_it_is_rounded(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, width, device="cuda").to(dtype) for n in (300, 77))
    wanted = x.double() @ weight.double().T
    with exact_products():
        found = linear_in_float32(x, weight)
    assert found.dtype == F32 and found.shape == (300, 77)
    assert float((found - wanted).abs().max()) <= 2.0**-14 * float(wanted.abs().max())
