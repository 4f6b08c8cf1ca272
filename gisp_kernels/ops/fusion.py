"""Which kernels score a weight gradient on a GPU: product and reduction in one, or cuBLAS and a reduction after it.

Fusing saves writing and reading the gradient, 4 bytes per weight in 16-bit precision whatever the token count; cuBLAS
makes better use of the GPU where the tiles of the product do not come out even. Measured on an H200 in bfloat16 at 13B
shapes (benchmarks/results/h200/kernels.json), the compiled Hopper kernel is 1.4 to 1.65 times as fast as cuBLAS and a
reduction at 512 tokens and 1.03 to 1.2 times at 2048. At 8192 the same kernel timed twice differs by up to a tenth;
within that, fused ones are as fast where their tiles fill the last wave and 5 to 12 % slower elsewhere. At 32768 tokens
they gain at most 2 % and lose up to 10 %. The persistent Triton kernel, for where the compiled one was not built, needs
1.2 times its time at 512 tokens and 1.06 times at 2048.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from gisp_kernels.ops import wgrad_native

# Above this many tokens fusing pays only for products whose tiles fill the GPU evenly.
FUSED_MAX_TOKENS = 4096
# Above this many it never does: between the two counts that were measured, 8192 and 32768.
EVEN_MAX_TOKENS = 16384
# Share of the multiprocessors that work, averaged over the waves of a product.
FULL_WAVES = 0.9


def prefer_fused(tokens: int, dtype: torch.dtype, *, tiles: int = 0, multiprocessors: int = 1) -> bool:
    """Whether ``backend="auto"`` on a GPU fuses product and reduction.

    float32 never fuses: exact float32 products cannot use tensor cores, and cuBLAS is far ahead without them.

    Args:
        tokens: extent that is summed over in the product.
        dtype: of the operands.
        tiles: tiles of the TMA kernel, 0 where it does not run.
        multiprocessors: of the GPU.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if tokens <= FUSED_MAX_TOKENS:
        return True
    if tokens > EVEN_MAX_TOKENS:
        return False
    waves = -(-tiles // multiprocessors)
    return tiles >= FULL_WAVES * waves * multiprocessors > 0


def fused_kernel(
    grad_output: torch.Tensor, input: torch.Tensor, weights: Sequence[torch.Tensor], axis: str
) -> tuple[str, int]:
    """The fused kernel for these operands, ``"tma"`` or ``"triton"`` (pointers), and the tiles of the former or 0.

    Args:
        grad_output: [T, columns].
        input: [T, I].
        weights: [O, I] each, side by side in ``grad_output``.
        axis: ``"row"`` or ``"column"``.
    """
    from gisp_kernels.triton import wgrad_tma
    from gisp_kernels.triton.wgrad_importance import MIN_LARGE_TILES

    if not input.is_cuda or not wgrad_tma.usable(grad_output, input, weights):
        return "triton", 0
    kept = 0 if axis == "row" else 1
    tiles = wgrad_tma.tiles([w.shape[kept] for w in weights], weights[0].shape[1 - kept])
    return ("tma", tiles) if tiles >= MIN_LARGE_TILES else ("triton", 0)


def plan(grad_output: torch.Tensor, input: torch.Tensor, weights: Sequence[torch.Tensor], axis: str) -> str:
    """What ``backend="auto"`` runs on a GPU.

    ``"native"`` (compiled), ``"tma"`` or ``"triton"`` for a fused kernel, ``"matmul"`` for cuBLAS and a reduction.
    """
    kernel, tiles = fused_kernel(grad_output, input, weights, axis)
    count = multiprocessors(input.device) if tiles else 1
    if not prefer_fused(input.shape[0], input.dtype, tiles=tiles, multiprocessors=count):
        return "matmul"
    native = kernel == "tma" and wgrad_native.why_not(grad_output, input, weights) is None
    return "native" if native else kernel


@functools.cache
def _count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return _count(torch.cuda.current_device() if device.index is None else device.index)
