"""What kernels ask of memory."""

from __future__ import annotations

import torch

from gisp_kernels.alignment import descriptor_aligned


def test_operands_a_descriptor_cannot_address() -> None:
    matrix = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert descriptor_aligned(matrix) and descriptor_aligned(matrix[:, :13]) and descriptor_aligned(matrix[:, 8:])
    assert not descriptor_aligned(matrix[:, 1:])
    assert not descriptor_aligned(matrix.t())
    assert not descriptor_aligned(torch.zeros(8, 60, dtype=torch.bfloat16))
