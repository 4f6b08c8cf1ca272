"""Transforms of torch.func, which run a module or a backward pass on tensors that stand for others."""

from __future__ import annotations

import torch


def refuse_transforms(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor inside ``torch.func.grad``, ``vmap`` and the like.

    Args:
        name: of the group, for the message.

    Raises:
        RuntimeError: it is one.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise RuntimeError(
            f"group {name!r} is recorded inside a transform of torch.func (grad, vmap, jvp): record loss.backward(), "
            "with keep_grad=True where the forward alone is a vmap"
        )
