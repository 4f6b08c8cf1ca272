"""Results of a step on their way to the host: many tensors, one wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Transfer:
    """Copies tensors of one device to the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: dict[tuple[int, torch.dtype, torch.Size], torch.Tensor] = {}

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors on the CPU, valid until the next call; waits for the device once, for all of them."""
        if self._device.type != "cuda":
            return list(tensors)
        # Memory of the host that is not pinned would be waited for tensor by tensor.
        fetched = [self._pinned_like(i, tensor) for i, tensor in enumerate(tensors)]
        for target, tensor in zip(fetched, tensors, strict=True):
            target.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return fetched

    def _pinned_like(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        key = (number, tensor.dtype, tensor.shape)
        if key not in self._pinned:
            self._pinned[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return self._pinned[key]
