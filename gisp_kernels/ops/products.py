"""Matrix products over tokens, rounded once or, of any factors, summed in float32.

A product of two 16-bit numbers is exact in float32, so tensor cores need no wider factors. Their sums drop low bits
where they align terms: on an H200 the largest entries over 16,384 tokens, sums of squares, are off by 6e-5 of
themselves. Products of float32 factors are off by 7e-6 there, and take 15 times as long. What is dropped grows with the
number of terms: sums of a few tokens, added in float64, are as exact as those and several times as fast.
"""

from __future__ import annotations

import torch

from gisp_kernels.alignment import pad_columns, pad_tokens, round_up

# Tokens whose products are summed in float32 where sums of many should be exact.
_EXACT_TOKENS = 1024


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


def add_exact_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left.T @ right``, with sums of few tokens in float32 and their sum in float64.

    Args:
        total: float64 [M, N].
        left: [T, M], float32 or the dtype of ``right``. Of float32 beside bfloat16 the upper and the lower half are
            multiplied, which keeps 17 bits of every factor.
        right: [T, N], float32, bfloat16 or float16.
    """
    mixed = left.dtype != right.dtype
    # Float16 has no place for small lower halves.
    if right.dtype == torch.float32 or (mixed and right.dtype == torch.float16):
        total += left.float().t() @ right.float()
        return
    halves = [left]
    if mixed:
        upper = left.to(right.dtype)
        halves = [upper, (left - upper.float()).to(right.dtype)]
    rows, columns = total.shape
    part = product_total(rows, columns, total.device)
    for start in range(0, len(right), _EXACT_TOKENS):
        few = slice(start, start + _EXACT_TOKENS)
        part.zero_()
        for half in halves:
            add_product(part, half[few], right[few])
        total += part[:rows, :columns]


def linear_in_float32(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``input @ weight.T`` before it is rounded, float32 [T, O].

    Args:
        input: [T, I].
        weight: [O, I], same dtype.
    """
    if not input.is_cuda or input.dtype == torch.float32:
        return input.float() @ weight.float().t()
    return torch.mm(pad_columns(input), pad_columns(weight).t(), out_dtype=torch.float32)
