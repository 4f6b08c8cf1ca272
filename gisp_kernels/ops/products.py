"""Matrix products over tokens, rounded once or, of any factors, summed in float32.

A product of two 16-bit numbers is exact in float32, so tensor cores need no wider factors. Their sums drop low bits
where they align terms: on an H200 the largest entries over 16,384 tokens, sums of squares, are off by 6e-5 of
themselves. Products of float32 factors are off by 7e-6 there, and take 15 times as long.
"""

from __future__ import annotations

import torch

from gisp_kernels.alignment import pad_tokens, round_up


def weight_grad(grad_output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """Weight gradient of a Linear, ``grad_output.T @ input``, [O, I], rounded to their dtype.

    Args:
        grad_output: [T, O].
        input: [T, I], same dtype.
    """
    left, right = grad_output.detach(), input.detach()
    if left.is_cuda:
        left, right = pad_tokens(left, right)
    return torch.mm(left.t(), right)[: grad_output.shape[1], : input.shape[1]]


def product_total(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Zeros for :func:`add_product`, float32; on a GPU both extents are rounded up to a multiple of 16.

    cuBLAS is several times slower on widths that do not allow 16-byte loads.
    """
    if device.type == "cuda":
        rows, columns = round_up(rows), round_up(columns)
    return torch.zeros(rows, columns, dtype=torch.float32, device=device)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left.T @ right``.

    Args:
        total: of :func:`product_total` for [M, N].
        left, right: [T, M] and [T, N], float32, bfloat16 or float16; two different dtypes meet in float32. Factors in
            float32 are multiplied as the process has set (``torch.set_float32_matmul_precision``).
    """
    if left.dtype != right.dtype or not total.is_cuda:
        left, right = left.float(), right.float()
    if not total.is_cuda:
        total.addmm_(left.t(), right)
        return
    left, right = pad_tokens(left, right)
    if right.dtype == torch.float32:
        total.addmm_(left.t(), right)
    else:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
