"""Inputs and expected outputs of block swaps, from indexing alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from gisp_kernels import _ext
from gisp_kernels.backend import has_triton, interpreting
from gisp_kernels.ops.swap import PreparedSwaps

NO_CORE = _ext.why_not("cpu")
NEEDS_INTERPRETER = pytest.mark.skipif(
    not (has_triton() and interpreting()), reason="needs Triton in its interpreter; test_swap_gpu.py has the GPU's"
)
BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(NO_CORE is not None, reason=str(NO_CORE))),
    pytest.param("triton", marks=NEEDS_INTERPRETER),
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern, so also NaNs with payloads, infinities and subnormals."""
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def random_pairs(count: int, n: int) -> torch.Tensor:
    return torch.randperm(count)[: 2 * n].view(n, 2)


def swapped(tensor: torch.Tensor, pairs: torch.Tensor, axis: str, block: int) -> torch.Tensor:
    """The expected tensor by one gather along ``axis``."""
    dim = 0 if axis == "row" else 1
    source = list(range(tensor.shape[dim] // block))
    for a, b in pairs.tolist():
        source[a], source[b] = source[b], source[a]
    lines = [s * block + i for s in source for i in range(block)]
    return tensor.index_select(dim, torch.tensor(lines, dtype=torch.int64))


def swap_blocks(
    tensors: Sequence[torch.Tensor],
    pairs: Sequence[torch.Tensor],
    axes: Sequence[str],
    blocks: Sequence[int],
    *,
    backend: str | None = None,
) -> None:
    """Swap ``pairs[i]``, int64 [n, 2], in tensor ``i``, once."""
    prepared = PreparedSwaps(tensors, axes, blocks, backend=backend)
    prepared.run({i: pair for i, pair in enumerate(pairs) if len(pair)})
