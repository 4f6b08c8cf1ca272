"""Cross entropy of one row of logits per program: a running maximum and sum, then, if asked, the gradient in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gisp_kernels.alignment import aligned, check_writable, readable
from gisp_kernels.forms import run

BLOCK = 4096


@triton.jit(do_not_specialize=["V", "stride"])
def _nll_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [T, V], becomes the gradient if GRAD
    targets_ptr,  # int64 [T]
    weights_ptr,  # float32 [T], unused without GRAD
    nll_ptr,  # float32 [T]
    V,
    stride,
    IGNORED: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    width = V
    if ALIGNED:
        width = (V // 16) * 16
        stride = (stride // 16) * 16
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    base = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK)
    if target == IGNORED:
        if GRAD:
            for start in range(0, width, BLOCK):
                offs = start + lanes
                tl.store(base + offs, tl.zeros((BLOCK,), tl.float32), mask=offs < width)
        tl.store(nll_ptr + row, 0.0)
    else:
        # Lanes keep their own maximum and sum: one reduction at the end is cheaper than one per block.
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            offs = start + lanes
            value = tl.load(base + offs, mask=offs < width, other=float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, value)
            # A lane that has seen nothing but -inf must not compute inf - inf.
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - safe) + tl.exp(value - safe)
            top = new_top
        row_top = tl.max(top, axis=0)
        log_sum = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), axis=0))
        known = (target >= 0) & (target < width)
        log_sum = tl.where(known, log_sum, float("nan"))
        tl.store(nll_ptr + row, log_sum - tl.load(base + target, mask=known, other=0.0).to(tl.float32))
        if GRAD:
            # The target's logit must be read by every thread before any overwrites it.
            tl.debug_barrier()
            weight = tl.load(weights_ptr + row)
            for start in range(0, width, BLOCK):
                offs = start + lanes
                value = tl.load(base + offs, mask=offs < width, other=0.0).to(tl.float32)
                gradient = tl.exp(value - log_sum) - tl.where(offs == target, 1.0, 0.0)
                tl.store(base + offs, gradient * weight, mask=offs < width)


def launch(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, ignored: int) -> torch.Tensor:
    """See :func:`gisp_kernels.ops.decoder.token_nll` (no ``weights``) and ``token_nll_grad_``; returns the NLL."""
    tokens, vocabulary = logits.shape
    if weights is None:
        logits = readable(logits)
    else:
        check_writable("logits", logits)
    nll = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        operands = logits, readable(targets), nll if weights is None else readable(weights), nll
        stride = logits.stride(0)
        constants = ignored, weights is not None, aligned(vocabulary, stride), BLOCK
        run(_nll_kernel, (tokens,), operands, (vocabulary, stride), constants, num_warps=8)
    return nll
