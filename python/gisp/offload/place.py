"""Putting a model where a plan says: layer by layer, so that no second copy of it ever stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gisp.mapped import give_back
from gisp.offload.host import HostMemory, numbered
from gisp.offload.stream import LayerStream

# Writes the weight of a name into memory of its shape and dtype.
Fill = Callable[[str, torch.Tensor], object]


@torch.no_grad()
def place(
    model: Any,
    streamed: tuple[int, ...],
    device: torch.device,
    *,
    inputs_on_host: bool = False,
    ends_on_host: bool = False,
    mapped: bool = False,
    fill: Fill | None = None,
) -> LayerStream:
    """Move the decoder layers of a model to host memory and everything else to the device, in place.

    Args:
        model: a causal language model with its layers at ``model.layers``.
        streamed: numbers of the layers that go to host memory.
        inputs_on_host, ends_on_host: as for :class:`gisp.offload.plan.Plan`.
        mapped: leave layers in the memory they are in, that of mapped files, which the system takes back at will. The
            device copies more slowly from there.
        fill: writes the weights of a model whose parameters have no memory yet.
    """
    device = numbered(device)
    memory = HostMemory(device)
    embedding, head = untied_ends(model) if ends_on_host else (None, None)
    visitors = [*(model.model.layers[i] for i in streamed), *([] if head is None else [head])]
    away = {id(p) for visitor in visitors for p in visitor.parameters()}
    # Of the embedding single rows are read: the device reads them where they are.
    seen = set() if embedding is None else {id(p) for p in embedding.parameters()}
    # By identity of the parameter as it was, which is held so that none takes its number.
    done: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or (mapped and id(parameter) in away):
                continue
            if id(parameter) not in done:
                home = memory if id(parameter) in away | seen else None
                data = _placed(parameter, f"{path}.{name}", device, home, fill)
                data = memory.seen(data) if id(parameter) in seen else data
                done[id(parameter)] = parameter, _with_data(parameter, data)
            module._parameters[name] = done[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    layers = model.model.layers
    held = None if mapped else memory
    return LayerStream(model, layers, streamed, device, head=head, boundaries_on_host=inputs_on_host, memory=held)


def untied_ends(model: Any) -> tuple[nn.Module, nn.Module] | tuple[None, None]:
    """Token embedding and output projection of a model, nothing where they share their weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return None, None
    return embedding, head


def stream_layers(model: Any, device: torch.device, *, mapped: bool = False) -> LayerStream:
    """Move all decoder layers of a model to host memory, for forward passes; ``mapped`` as for :func:`place`."""
    return place(model, tuple(range(len(model.model.layers))), device, mapped=mapped)


def placed_like(model: Any, other: Any) -> Any:
    """A model that files of the host back where another one computes: on its device, or its layers where they are."""
    device = other.get_input_embeddings().weight.device
    if LayerStream.of(other) is None:
        return model.to(device)
    stream_layers(model, device, mapped=True)
    return model


def _placed(
    parameter: nn.Parameter, name: str, device: torch.device, memory: HostMemory | None, fill: Fill | None
) -> torch.Tensor:
    """A parameter's values in memory of their own, at their place."""
    old = parameter.detach()
    if memory is None and fill is None:
        moved = old.to(device)
        give_back(old)
        return moved
    shape = tuple(parameter.shape)
    dtype = parameter.dtype
    new = memory.empty(shape, dtype) if memory else torch.empty(shape, dtype=dtype, device=device)
    if fill is None:
        new.copy_(old)
        give_back(old)
    else:
        fill(name, new)
    return new


def _with_data(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """The parameter with other values; a new one where it had no memory."""
    if parameter.is_meta:
        return nn.Parameter(data, requires_grad=parameter.requires_grad)
    parameter.data = data
    return parameter
