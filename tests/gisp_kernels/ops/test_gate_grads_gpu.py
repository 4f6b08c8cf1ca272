"""The compiled gate gradient kernels on a GPU. ``-k sanitizer`` selects a small subset for compute-sanitizer."""

from __future__ import annotations

import pytest
import torch
from selection_oracle import assert_same_selection

from gisp_kernels import gate_grads
from gisp_kernels.testing import assert_error_budget, gate_truth

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sequences, tokens, columns, block.
SHAPES = (
    (32, 256, 13824, 1),
    (32, 256, 5120, 128),
    (4, 2048, 1000, 1),
    (3, 77, 3457, 1),
    (5, 33, 192, 24),
    (1, 8192, 256, 64),
    (2, 100, 4096, 512),
    # SmolLM2, and single long sequences, which come in parts.
    (8, 256, 576, 64),
    (8, 256, 1536, 1),
    (1, 2048, 4096, 128),
    (1, 2049, 7440, 1),
    (1, 5000, 40, 1),
    (1, 1, 1, 1),
)
IDS = ["x".join(map(str, shape)) for shape in SHAPES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_error_selection_and_repeatability(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, grad = (torch.randn(shape[:3], device="cuda").to(dtype) for _ in range(2))
    truth = gate_truth(x, grad, shape[3])
    # Poisoned: every element is to be written.
    out = torch.full((shape[0], shape[2] // shape[3]), float("nan"), device="cuda")
    found = gate_grads(x, grad, block=shape[3], out=out, backend="triton")
    assert_error_budget(found.flatten(), truth.scores.float(), truth)
    if found.numel() > 3:
        assert_same_selection(found.flatten(), truth, found.numel() // 2)
    assert torch.equal(found, gate_grads(x, grad, block=shape[3], backend="triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 16])
def test_prefixes_of_wider_rows(block: int, dtype: torch.dtype) -> None:
    base = torch.full((6, 50, 640), float("nan"), device="cuda", dtype=dtype)
    x, grad = base[:, :, :336], base.clone()[:, :, 300:636]
    x.copy_(torch.randn(x.shape))
    grad.copy_(torch.randn(grad.shape))
    truth = gate_truth(x, grad, block)
    wide = torch.full((6, 1000), float("nan"), device="cuda")
    out = gate_grads(x, grad, block=block, out=wide[:, 7 : 7 + 336 // block], backend="triton")
    assert_error_budget(out.flatten(), truth.scores.float(), truth)
    assert int(wide.isnan().sum()) == wide.numel() - out.numel()


@pytest.mark.parametrize("block", [1, 8])
def test_sanitizer(block: int) -> None:
    x, grad = (torch.randn(3, 37, 104, device="cuda") for _ in range(2))
    truth = gate_truth(x, grad, block)
    assert_error_budget(gate_grads(x, grad, block=block, backend="triton").flatten(), truth.scores.float(), truth)
