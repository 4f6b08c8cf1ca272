"""The weights of one decoder layer: where they lie in host memory, and as what they appear on the device."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from math import prod

import torch
from torch import nn

from gisp.mapped import give_back

# torch gives every tensor of a GPU memory that begins at a multiple of this; products are chosen by alignment, too.
_ALIGNMENT = 512


class LayerWeights:
    """Parameters of a layer, or of the output projection, that are in host memory but for the time of a visit.

    On the device a weight has the strides that it would have if it had always been there, a prefix of the dense weight,
    so that products read the same layout and give the same bits.

    Args:
        layer: its parameters lie in host memory, as they are before anything is removed.
        shrinks: whether anything is removed from it.
        mapped: whether files back them, so that what was fetched need not stay in memory.

    Attributes:
        bytes: memory of a visit.
        gaps: bytes of the largest weight whose rows arrive without the gaps they have on the device.
    """

    def __init__(self, layer: nn.Module, shrinks: bool = True, *, mapped: bool = False) -> None:
        self._mapped = mapped
        self._parameters = list(layer.parameters())
        self._shapes = [tuple(parameter.shape) for parameter in self._parameters]
        sizes = [prod(shape) * p.element_size() for shape, p in zip(self._shapes, self._parameters, strict=True)]
        *self._offsets, self.bytes = accumulate((_aligned(size) for size in sizes), initial=0)
        matrices = [size for shape, size in zip(self._shapes, sizes, strict=True) if len(shape) == 2]
        self.gaps = max(matrices, default=0) if shrinks else 0
        self._homes: list[torch.Tensor] = []
        self._views: list[torch.Tensor] = []

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is one of them."""
        return any(parameter is own for own in self._parameters)

    def fetch(self, slot: torch.Tensor, beside: torch.Tensor) -> int:
        """Copy what is kept of every weight into device memory; the bytes that cross.

        Args:
            slot: uint8 [at least ``bytes``] on the device.
            beside: uint8 [at least ``gaps``] on the device, overwritten.
        """
        self._views, crossed = [], 0
        for parameter, shape, offset in zip(self._parameters, self._shapes, self._offsets, strict=True):
            home = parameter.detach()
            place = _typed(slot, offset, shape, home.dtype)
            view = place[tuple(slice(extent) for extent in home.shape)]
            self._views.append(view)
            if not home.numel():
                continue
            pitch = home.stride(0) if home.dim() == 2 else 0
            source = _rows(home, pitch)
            # One copy of whole rows is what a bus is fast at. Where they have gaps they get these on the device.
            spread = home.dim() == 2 and pitch != shape[1]
            target = _typed(beside, 0, tuple(source.shape), home.dtype) if spread else _rows(view, pitch)
            target.copy_(source, non_blocking=True)
            if spread:
                view.copy_(target[:, : home.shape[1]])
            crossed += source.numel() * source.element_size()
            if self._mapped:
                # A copy out of memory that is not registered with CUDA has read it when it returns.
                give_back(home)
        return crossed

    def show(self) -> None:
        """Let the parameters show what was fetched."""
        self._homes = [parameter.detach() for parameter in self._parameters]
        _point(self._parameters, self._views)

    def hide(self) -> None:
        """Let them show host memory again."""
        _point(self._parameters, self._homes)
        self._homes = []


def _point(parameters: Iterable[nn.Parameter], tensors: Iterable[torch.Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor


def _rows(tensor: torch.Tensor, pitch: int) -> torch.Tensor:
    """A matrix with whatever lies between its rows, or a vector as it is."""
    return tensor if tensor.dim() == 1 else tensor.as_strided((tensor.shape[0], pitch), (pitch, 1))


def _typed(memory: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = prod(shape) * dtype.itemsize
    return memory[offset : offset + size].view(dtype).view(shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
