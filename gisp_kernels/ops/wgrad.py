"""Which kernel scores a weight gradient on a GPU: product and reduction in one, or cuBLAS and a reduction after it.

Fusing saves writing and reading the gradient, 4 bytes per weight in 16-bit precision whatever the token count; cuBLAS
makes better use of the GPU where the tiles of the product do not come out even. Measured on an H200 in bfloat16 at 13B
shapes (benchmarks/results/h200/kernels.json), the compiled Hopper kernel is 1.4 to 1.65 times as fast as cuBLAS and a
reduction at 512 tokens and 1.03 to 1.2 times at 2048. At 8192 the same kernel timed twice differs by up to a tenth;
within that, fused ones are as fast where their tiles fill the last wave and 5 to 12 % slower elsewhere. At 32768 tokens
they gain at most 2 % and lose up to 10 %. The persistent Triton kernel, for where the compiled one was not built, needs
1.2 times its time at 512 tokens and 1.06 times at 2048.

Tiles of the last wave are not split over tokens (stream-K). On 132 multiprocessors the waves of a layer's products are
94 to 98 % full at 13B and 8B shapes, 88 % at half an 8B. Absolute values wait for whole sums, so every part of a split
tile is written and read as 128 KB of float32, by one more launch. Counted like that, splitting saves nothing at 512
tokens; at 2048 it saves at most 2 % of a layer, 6 % at half an 8B.

Every fused kernel leaves one float32 sum per row and tile in a workspace, which a second kernel adds up in a fixed
order. Operands are ``grad_output`` [T, columns], ``input`` [T, I] and the ``weights`` [O, I] of layers that read it,
which own the columns of ``grad_output`` from their ``starts`` on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from gisp_kernels import _ext
from gisp_kernels import backend as backends
from gisp_kernels.alignment import descriptor_aligned

# Above this many tokens fusing pays only for products whose tiles fill the GPU evenly.
FUSED_MAX_TOKENS = 4096
# Above this many it never pays. The limit lies between the two counts that were measured, 8192 and 32768.
EVEN_MAX_TOKENS = 16384
# Share of the multiprocessors that work, averaged over the waves of a product.
FULL_WAVES = 0.9
DTYPES = (torch.bfloat16, torch.float16)
# Major compute capability of Hopper GPUs, the first with a tensor memory accelerator.
HOPPER = 9


def choose(
    grad_output: torch.Tensor, input: torch.Tensor, weights: Sequence[torch.Tensor], axis: str, backend: str | None
) -> str:
    """What scores these layers: a result of :func:`plan`, or ``"reference"``.

    A backend named by the caller takes several layers one by one (``"apart"``), except plain torch.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the requested backend cannot run here.
    """
    asked = backends.requested(backend)
    if len(weights) > 1 and asked in ("native", "triton"):
        return "apart"
    if asked == "native":
        reason = native_why_not(grad_output, input, weights)
        if reason is not None:
            raise RuntimeError(f"backend 'native' cannot run here: {reason}")
        return asked
    if backends.resolve(backend, input) == "reference":
        return "reference"
    if asked == "triton":
        return fused_kernel(grad_output, input, weights, axis)[0]
    return plan(grad_output, input, weights, axis)


def plan(grad_output: torch.Tensor, input: torch.Tensor, weights: Sequence[torch.Tensor], axis: str) -> str:
    """What ``backend="auto"`` runs on a GPU.

    ``"native"`` (compiled), ``"tma"`` or ``"triton"`` for a fused kernel, ``"matmul"`` for cuBLAS and a reduction,
    ``"apart"`` where the fused kernel does not take that many layers: each is then planned by itself.
    """
    from gisp_kernels.triton import wgrad_tma

    kernel, tiles = fused_kernel(grad_output, input, weights, axis)
    count = multiprocessors(input.device) if tiles else 1
    if not prefer_fused(input.shape[0], input.dtype, tiles=tiles, multiprocessors=count):
        return "matmul"
    if kernel == "tma" and native_why_not(grad_output, input, weights) is None:
        return "native"
    return kernel if len(weights) <= (wgrad_tma.MAX_LAYERS if kernel == "tma" else 1) else "apart"


def prefer_fused(tokens: int, dtype: torch.dtype, *, tiles: int = 0, multiprocessors: int = 1) -> bool:
    """Whether ``backend="auto"`` on a GPU fuses product and reduction.

    float32 never fuses: exact float32 products cannot use tensor cores, and cuBLAS is far ahead without them.

    Args:
        tokens: extent that is summed over in the product.
        dtype: of the operands.
        tiles: tiles of the TMA kernel, 0 where it does not run.
        multiprocessors: of the GPU.
    """
    if dtype not in DTYPES:
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
    """The fused Triton kernel for these operands, ``"tma"`` or ``"triton"`` (pointers), and the tiles of the former or
    0."""
    from gisp_kernels.triton import wgrad_tma
    from gisp_kernels.triton.wgrad_importance import MIN_LARGE_TILES

    if _bulk_why_not(grad_output, input, weights) or not runs_descriptors(
        torch.cuda.get_device_properties(input.device)
    ):
        return "triton", 0
    kept = 0 if axis == "row" else 1
    tiles = wgrad_tma.tiles([w.shape[kept] for w in weights], weights[0].shape[1 - kept])
    return ("tma", tiles) if tiles >= MIN_LARGE_TILES else ("triton", 0)


def runs_descriptors(gpu: Any) -> bool:
    """Whether a GPU with these properties runs the TMA kernel.

    GeForce GPUs of capability 12 have the accelerator and less than half the shared memory.
    """
    from gisp_kernels.triton import wgrad_tma

    return gpu.major >= HOPPER and gpu.shared_memory_per_block_optin >= wgrad_tma.SHARED_BYTES


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _bulk_why_not(grad_output: torch.Tensor, input: torch.Tensor, weights: Sequence[torch.Tensor]) -> str | None:
    """Why a tensor memory accelerator could not copy these operands, or ``None`` if it could."""
    operands = (grad_output, input, *weights)
    if not input.is_cuda:
        return f"the operands are on {input.device}"
    if input.dtype not in DTYPES or any(t.dtype != input.dtype for t in operands):
        found = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in operands}))
        return f"the operands must all be bfloat16 or all float16, got {found}"
    if not all(descriptor_aligned(t) for t in operands):
        return "rows must be contiguous, and start at multiples of 16 bytes"
    return None


def native_why_not(grad_output: torch.Tensor, input: torch.Tensor, weights: Sequence[torch.Tensor]) -> str | None:
    """Why the compiled kernel cannot take these operands, or ``None`` when it can."""
    reason = _bulk_why_not(grad_output, input, weights)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(input.device)
    if capability[0] != HOPPER:
        return f"the GPU has compute capability {capability}, not {HOPPER}.x"
    if not _ext.has_sm90():
        return _ext.why_not("cuda") or "the compiled core was built without the Hopper kernel (nvcc older than 12.5)"
    if not backends.has_triton():
        return "triton, which adds up the sums of tiles, is not installed"
    if len(weights) > _ext.core().wgrad_max_layers:
        return f"{len(weights)} layers are more than the {_ext.core().wgrad_max_layers} of one launch"
    return None


def native_partial_sums(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    starts: Sequence[int],
    axis: str,
    programs: int,
) -> torch.Tensor:
    """:func:`gisp_kernels.triton.wgrad_tma.partial_sums` by the compiled core, for Hopper GPUs.

    The kernel in ``csrc`` feeds tensor cores by bulk copies while the previous tile meets W, so that little but the
    product takes time. Operands are such as :func:`native_why_not` accepts.
    """
    core = _ext.core()
    left, right = (grad_output, input) if axis == "row" else (input, grad_output)
    extents = [weight.shape[0 if axis == "row" else 1] for weight in weights]
    strips = -(-right.shape[1] // core.wgrad_tile[1])
    partials = torch.empty((strips, sum(extents)), dtype=torch.float32, device=input.device)
    with torch.cuda.device_of(input):
        core.wgrad_sums_sm90(
            left=(left.data_ptr(), _pitch(left), left.shape[1]),
            right=(right.data_ptr(), _pitch(right), right.shape[1]),
            tokens=input.shape[0],
            layers=[(w.data_ptr(), _pitch(w), n, start) for w, n, start in zip(weights, extents, starts, strict=True)],
            by_column=axis == "column",
            bfloat16=input.dtype == torch.bfloat16,
            partials=partials.data_ptr(),
            programs=programs,
            device=partials.device.index,
            stream=torch.cuda.current_stream(input.device).cuda_stream,
        )
    return partials


def _pitch(tensor: torch.Tensor) -> int:
    return tensor.stride(0) * tensor.element_size()


def add_fused(
    outs: Sequence[torch.Tensor],
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    starts: Sequence[int],
    blocks: Sequence[int],
    axis: str,
    kernel: str,
) -> None:
    """Add the scores of layers by a fused kernel.

    Args:
        outs: float32 [count] of each layer.
        blocks: rows or columns per structure of each.
        axis: ``"row"``, or for one layer ``"column"``.
        kernel: ``"native"``, ``"tma"``, or for one layer ``"triton"``.
    """
    from gisp_kernels.triton import wgrad_importance, wgrad_tma
    from gisp_kernels.triton.abs_weighted_reduce import finish

    if not (input.numel() and all(weight.numel() for weight in weights)):
        return
    if kernel == "triton":
        partials = wgrad_importance.partial_sums(grad_output, input, weights[0], axis)
    else:
        launch = native_partial_sums if kernel == "native" else wgrad_tma.partial_sums
        partials = launch(grad_output, input, weights, starts, axis, multiprocessors(input.device))
    extents = [weight.shape[0 if axis == "row" else 1] for weight in weights]
    for out, own, block in zip(outs, partials.split(extents, dim=1), blocks, strict=True):
        finish(out, own, block)
