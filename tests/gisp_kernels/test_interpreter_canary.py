"""Facts about Triton's interpreter that other tests rely on; a failure here means their restrictions can go."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiled kernels in use")


def dot(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    from gisp_kernels import wgrad_importance

    dy, x, weight = torch.randn(32, 16), torch.randn(32, 16), torch.randn(16, 16)
    dy, x = dy.to(dtype), x.to(dtype)
    expected = wgrad_importance(dy.float(), x.float(), weight, backend="reference")
    return wgrad_importance(dy, x, weight, backend="triton"), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dot_is_right_in_these_dtypes(dtype: torch.dtype) -> None:
    scores, expected = dot(dtype)
    torch.testing.assert_close(scores, expected)


def test_bfloat16_dot_is_wrong() -> None:
    scores, expected = dot(torch.bfloat16)
    assert not torch.allclose(scores, expected, rtol=0.1)


def test_programs_can_be_shuffled() -> None:
    import triton
    import triton.language as tl
    from interpreter import shuffled_grid

    @triton.jit
    def visit(order_ptr, counter_ptr):
        tl.store(order_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))

    def run() -> list[int]:
        order, counter = torch.full((16,), -1), torch.zeros(1, dtype=torch.int64)
        visit[(16,)](order, counter)
        return order.tolist()

    assert run() == list(range(16))
    with shuffled_grid(1):
        shuffled = run()
    assert shuffled != list(range(16))
    assert sorted(shuffled) == list(range(16))
