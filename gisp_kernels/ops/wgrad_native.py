"""``out[s] += sum |W * (dY^T X)|`` for 16-bit weights on Hopper GPUs, by the compiled core.

The kernel in ``csrc`` feeds tensor cores by bulk copies while the previous tile meets W, so that little but the product
takes time. Like the Triton kernels it leaves one float32 sum per row and tile in a workspace that a second launch adds
up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from gisp_kernels import _ext
from gisp_kernels import backend as backends
from gisp_kernels.alignment import descriptor_aligned

if TYPE_CHECKING:
    from gisp_kernels.triton.wgrad_tma import Layer

DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY = 9


def why_not(grad_output: torch.Tensor, input: torch.Tensor, weights: Sequence[torch.Tensor]) -> str | None:
    """Why the kernel cannot take these operands, or ``None`` when it can.

    Args:
        grad_output: [T, columns].
        input: [T, I].
        weights: [O, I] each.
    """
    if not input.is_cuda:
        return f"the operands are on {input.device}"
    if input.dtype not in DTYPES or any(t.dtype != input.dtype for t in (grad_output, *weights)):
        return f"the operands must all be bfloat16 or all float16, got {_dtypes(grad_output, input, *weights)}"
    if not all(descriptor_aligned(tensor) for tensor in (grad_output, input, *weights)):
        return "rows must be contiguous, and start at multiples of 16 bytes"
    if torch.cuda.get_device_capability(input.device)[0] != CAPABILITY:
        return f"the GPU has compute capability {torch.cuda.get_device_capability(input.device)}, not {CAPABILITY}.x"
    if not _ext.has_sm90():
        return _ext.why_not("cuda") or "the compiled core was built without the Hopper kernel (nvcc older than 12.5)"
    if not backends.has_triton():
        return "triton, which adds up the sums of tiles, is not installed"
    if len(weights) > _ext.core().wgrad_max_layers:
        return f"{len(weights)} layers are more than the {_ext.core().wgrad_max_layers} of one launch"
    return None


def launch(grad_output: torch.Tensor, input: torch.Tensor, layers: Sequence[Layer], axis: str, programs: int) -> None:
    """Add the scores of layers that read one input; operands as :func:`why_not` accepts them.

    Args:
        grad_output: [T, columns].
        input: [T, I].
        layers: scored layers; by columns only one.
        axis: ``"row"`` or ``"column"``.
        programs: at most that many thread blocks run; it shapes no result.
    """
    from gisp_kernels.triton.abs_weighted_reduce import finish

    kept = 0 if axis == "row" else 1
    left, right = (grad_output, input) if axis == "row" else (input, grad_output)
    extents = [layer.weight.shape[kept] for layer in layers]
    width = right.shape[1]
    if not all(extents) or width == 0 or input.shape[0] == 0:
        return
    core = _ext.core()
    strips = -(-width // core.wgrad_tile[1])
    partials = torch.empty((strips, sum(extents)), dtype=torch.float32, device=input.device)
    with torch.cuda.device(input.device):
        core.wgrad_sums_sm90(
            left=_operand(left),
            right=_operand(right),
            tokens=input.shape[0],
            layers=[
                (layer.weight.data_ptr(), _pitch(layer.weight), extent, layer.start)
                for layer, extent in zip(layers, extents, strict=True)
            ],
            by_column=axis == "column",
            bfloat16=input.dtype == torch.bfloat16,
            partials=partials.data_ptr(),
            programs=programs,
            device=partials.device.index,
            stream=torch.cuda.current_stream(input.device).cuda_stream,
        )
        first = 0
        for layer, extent in zip(layers, extents, strict=True):
            finish(layer.out, partials[:, first : first + extent], layer.block)
            first += extent


def _operand(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), _pitch(tensor), tensor.shape[1]


def _pitch(tensor: torch.Tensor) -> int:
    return tensor.stride(0) * tensor.element_size()


def _dtypes(*tensors: torch.Tensor) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
