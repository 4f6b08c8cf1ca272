"""What recording has to know of data and tensor parallelism: who would miss a gradient, what is a shard of what."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a ``DTensor`` (``fully_shard``, ``parallelize_module``)."""
    if not torch.distributed.is_available() or type(tensor) in (torch.Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A ``DTensor`` gathered from its mesh, every rank of which must call; another tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def refuse_data_parallel(name: str) -> None:
    """Refuse a forward inside ``DistributedDataParallel`` that waits for the gradient of every weight.

    Raises:
        RuntimeError: there is one.
    """
    wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None and not wrapper.find_unused_parameters:
        raise RuntimeError(
            f"group {name!r} is scored inside DistributedDataParallel, which waits for the weight gradients that "
            "recording takes away: pass keep_grad=True, or freeze the weights"
        )


def added_over(tensors: list[torch.Tensor], group: Any) -> list[torch.Tensor]:
    """Sums over the processes of a group; every one of them must call, with tensors of the same shapes."""
    totals = [tensor.clone() for tensor in tensors]
    for total in totals:
        torch.distributed.all_reduce(total, group=group)
    return totals
