"""What kernels ask of an operand's memory, and the copies that give it: contiguous rows, extents of 16 elements."""

from __future__ import annotations

import torch

ALIGNMENT = 16
# A tensor memory accelerator asks for addresses and row strides in multiples of this.
DESCRIPTOR_BYTES = 16


def round_up(extent: int) -> int:
    """The next multiple of :data:`ALIGNMENT`."""
    return -(-extent // ALIGNMENT) * ALIGNMENT


def aligned(*values: int, to: int = ALIGNMENT) -> bool:
    """Whether every extent and stride is a multiple of so many elements."""
    # A launch asks this, and a generator would take as long as all the rest of it.
    union = 0
    for value in values:
        union |= value
    return union % to == 0


def descriptor_aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor memory accelerator can address the rows of a matrix."""
    pitch = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and pitch % DESCRIPTOR_BYTES == 0 and tensor.data_ptr() % DESCRIPTOR_BYTES == 0


def pad_tokens(*operands: torch.Tensor) -> list[torch.Tensor]:
    """Each [T, n] as :func:`pad_columns` gives it, and with zero rows up to a multiple of 16 tokens.

    On an H200 (CUDA 13.0) a cuBLAS product ``dY.T @ X`` in 16-bit precision over 4097 tokens leaves out the last one,
    float32 output or not.
    """
    tokens = operands[0].shape[0]
    padded = [pad_columns(operand) for operand in operands]
    if aligned(tokens):
        return padded
    return [torch.nn.functional.pad(operand, (0, 0, 0, -tokens % ALIGNMENT)) for operand in padded]


def pad_columns(tokens: torch.Tensor) -> torch.Tensor:
    """[T, n] with zero columns up to a multiple of 16, copied only if its rows do not allow 16-byte loads.

    Odd widths leave tensor cores waiting for 2-byte loads; against a product over all tokens the copy is cheap.
    """
    if aligned(tokens.stride(0), tokens.shape[1]) and tokens.stride(1) == 1:
        return tokens
    return torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % ALIGNMENT)).contiguous()


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, copied if its last dimension is not contiguous."""
    # All strides at once are asked for in a third of the time that one takes.
    return tensor if tensor.stride()[-1] == 1 else tensor.contiguous()


def check_writable(name: str, tensor: torch.Tensor) -> None:
    """Refuse a result that a kernel cannot write in place.

    Raises:
        ValueError: the last dimension is not contiguous.
    """
    if tensor.stride()[-1] != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} is written in place and must have contiguous rows, got strides {tensor.stride()}")


def readable_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A matrix as :func:`readable` gives it, and the stride of its rows: a launch asks for strides once."""
    pitch, step = matrix.stride()
    if step == 1:
        return matrix, pitch
    copy = matrix.contiguous()
    return copy, copy.stride()[0]


def writable_rows(name: str, matrix: torch.Tensor) -> int:
    """The stride of the rows of a matrix that :func:`check_writable` does not refuse."""
    pitch, step = matrix.stride()
    if step != 1:
        check_writable(name, matrix)
    return pitch
