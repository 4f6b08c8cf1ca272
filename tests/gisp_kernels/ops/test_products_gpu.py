"""Products over tokens on a GPU: 16-bit factors, float32 sums, no token left out."""

from __future__ import annotations

import pytest
import torch

from gisp.model.modes import exact_products
from gisp_kernels.ops.products import add_product, product_total
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
