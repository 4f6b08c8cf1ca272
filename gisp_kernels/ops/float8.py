"""Matrix products of 8-bit floats (e4m3) with one scale per row of each operand.

A row is divided by its scale, the largest magnitude in it over 448, and rounded to e4m3: three bits of fraction, so
each element is off by up to 1/16 of itself. Products accumulate in the tensor core's own precision and are multiplied
by both scales. Weights are scaled by output feature; for the product with their transpose those scales meet the other
operand's columns before it is rounded, so that forward and backward use the same rounded weight.
"""

from __future__ import annotations

import torch

from gisp_kernels import backend as backends
from gisp_kernels import checks
from gisp_kernels.alignment import aligned

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
# The reciprocal of the smallest scale is still finite in float32.
SMALLEST_SCALE = 1e-37
CAPABILITY = (8, 9)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why :func:`scaled_product` cannot give ``dtype`` on a device, ``None`` if it can (on a CPU it is emulated)."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"the GPU has compute capability {capability}, 8-bit products need {CAPABILITY}"
    return None if dtype == torch.bfloat16 else f"8-bit products give bfloat16 on a GPU, not {dtype}"


def fits(*extents: int) -> bool:
    """Whether tensor cores take an 8-bit product of these extents: multiples of 16, none of them 0."""
    return min(extents) > 0 and aligned(*extents)


def quantize_rows(
    x: torch.Tensor,
    column_scale: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in 8 bits with a scale each: ``x * column_scale ~ out * scale[:, None]``.

    Args:
        x: [M, K], float32, bfloat16 or float16, contiguous rows.
        column_scale: float32 [K], what columns are multiplied by first.
        out: e4m3 [M, K] with contiguous rows to fill, or ``None`` for new memory.
        scale: float32 [M] to fill, or ``None`` for new memory.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        ``out`` and ``scale``. A row holding NaN or infinity holds NaN.

    Raises:
        TypeError, ValueError: dtype or shapes that do not fit.
        RuntimeError: the requested backend cannot run here.
    """
    checks.check_matrix("x", x)
    rows, columns = x.shape
    if column_scale is not None:
        checks.check_same_shape("column_scale", column_scale, (columns,))
    out = torch.empty(rows, columns, dtype=FLOAT8, device=x.device) if out is None else out
    scale = torch.empty(rows, dtype=torch.float32, device=x.device) if scale is None else scale
    checks.check_same_shape("out", out, (rows, columns))
    checks.check_same_shape("scale", scale, (rows,))
    if backends.resolve(backend, x) == "triton":
        from gisp_kernels.triton import float8 as kernel

        kernel.quantize_rows(x, column_scale, out, scale, LARGEST, SMALLEST_SCALE)
    else:
        value = x.float() if column_scale is None else x.float() * column_scale
        largest = value.abs().amax(1) if columns else value.new_zeros(rows)
        # The divisor is a tensor: torch multiplies by the reciprocal of a number, which rounds differently on a GPU.
        scale.copy_((largest / torch.full_like(largest, LARGEST)).clamp_min(SMALLEST_SCALE))
        out.copy_((value * (1 / scale)[:, None]).to(FLOAT8))
    return out, scale


def quantize_transposed(
    weight: torch.Tensor, scale: torch.Tensor, *, out: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """The transpose of what :func:`quantize_rows` made of ``weight``, from the scale it gave.

    Args:
        weight: [O, I], float32, bfloat16 or float16, contiguous rows.
        scale: float32 [O].
        out: e4m3 [I, O] with contiguous rows to fill, or ``None`` for new memory.
        backend: as in :func:`quantize_rows`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize_rows`.
    """
    checks.check_matrix("weight", weight)
    rows, columns = weight.shape
    checks.check_same_shape("scale", scale, (rows,))
    out = torch.empty(columns, rows, dtype=FLOAT8, device=weight.device) if out is None else out
    checks.check_same_shape("out", out, (columns, rows))
    if backends.resolve(backend, weight) == "triton":
        from gisp_kernels.triton import float8 as kernel

        kernel.quantize_transposed(weight, scale, out)
    else:
        out.copy_((weight.float() * (1 / scale)[:, None]).to(FLOAT8).t())
    return out


def scaled_product(
    left: torch.Tensor,
    left_scale: torch.Tensor,
    right: torch.Tensor,
    right_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(left @ right.T) * left_scale[:, None] * right_scale[None]``.

    On a GPU the product of :func:`torch._scaled_mm` with its faster accumulation, whose error is below that of the
    operands' rounding; elsewhere both operands are widened to float32.

    Args:
        left: e4m3 [M, K], contiguous.
        left_scale: float32 [M].
        right: e4m3 [N, K], contiguous; N and K are multiples of 16.
        right_scale: float32 [N], ``None`` for ones.
        dtype: of the result; on a GPU bfloat16.

    Returns:
        [M, N], contiguous.
    """
    if not left.is_cuda:
        product = torch.mm(left.float(), right.float().t()) * left_scale[:, None]
        return (product if right_scale is None else product * right_scale).to(dtype)
    if right_scale is None:
        right_scale = torch.ones(right.shape[0], dtype=torch.float32, device=right.device)
    return torch._scaled_mm(
        left,
        right.t(),
        scale_a=left_scale[:, None],
        scale_b=right_scale[None],
        out_dtype=dtype,
        use_fast_accum=True,
    )
