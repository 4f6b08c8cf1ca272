"""What of a layer goes with its outputs or its inputs: lines of its tensors, and the sizes it keeps as attributes.

Rows are outputs and columns inputs, whatever way the layer stores its weight. What has as many outputs as inputs and
mixes none of them, a normalisation or a depthwise convolution, has rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Sizes = Mapping[str, Callable[[int], Any]]


@dataclass(frozen=True)
class Lines:
    """What belongs to the outputs or to the inputs of one layer.

    Attributes:
        tensors: name -> dimension along which they lie there. Tensors that the layer does without are left out.
        sizes: attribute -> its value by the number of lines.
        count: lines at present.
        unit: so many consecutive lines go together, or none of them.
    """

    tensors: Mapping[str, int]
    sizes: Sizes
    count: int
    unit: int = 1


def lines_of(layer: nn.Module, axis: str) -> Lines:
    """What belongs to the outputs (``axis="row"``) or inputs (``"column"``) of a layer.

    Known are ``nn.Linear``, convolutions, ``nn.Embedding``, normalisations, ``nn.PReLU``, the ``Conv1D`` of
    transformers, and every layer that owns nothing but vectors of one length (any RMSNorm).

    Raises:
        TypeError: the layer is none of these.
        ValueError: it has no lines on this axis that can go.
    """
    rows = axis == "row"
    if isinstance(layer, nn.Linear):
        if rows:
            return _of(layer, {"weight": 0, "bias": 0}, "out_features")
        return _of(layer, {"weight": 1}, "in_features")
    if isinstance(layer, _ConvNd):
        return _of_convolution(layer, rows)
    if isinstance(layer, nn.Embedding):
        if rows:
            return _of(layer, {"weight": 1}, "embedding_dim")
        if layer.padding_idx is not None:
            raise ValueError(f"an Embedding with padding_idx={layer.padding_idx} cannot lose entries: they would move")
        return _of(layer, {"weight": 0}, "num_embeddings")
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        return _of(layer, {"weight": 1, "bias": 0}, "nf") if rows else _of(layer, {"weight": 0}, "nx")
    if not rows:
        raise ValueError(f"a {type(layer).__name__} has no columns that can go, only rows")
    return _of_vectors(layer)


def _of(layer: nn.Module, tensors: Mapping[str, int], size: str) -> Lines:
    return _lines(layer, tensors, {size: int}, getattr(layer, size))


def _lines(layer: nn.Module, tensors: Mapping[str, int], sizes: Sizes, count: int, unit: int = 1) -> Lines:
    """Of the tensors those that the layer has; the weight tells their number, if there is one."""
    present = {name: dim for name, dim in tensors.items() if getattr(layer, name, None) is not None}
    for name, dim in present.items():
        return Lines(present, sizes, getattr(layer, name).shape[dim], unit)
    return Lines(present, sizes, count, unit)


def _of_convolution(conv: _ConvNd, rows: bool) -> Lines:
    transposed = isinstance(conv, _ConvTransposeNd)
    if conv.groups == 1:
        # A transposed convolution stores its weight [in, out, ...].
        weight = {"weight": int(rows == transposed)}
        return _of(conv, {**weight, "bias": 0}, "out_channels") if rows else _of(conv, weight, "in_channels")
    if transposed:
        raise ValueError(f"a {type(conv).__name__} of {conv.groups} groups cannot be cut")
    if not rows:
        raise ValueError(f"a {type(conv).__name__} of {conv.groups} groups loses whole groups: give its rows alone")
    # The rows of a group take the group's input channels with them.
    unit, inputs = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    sizes: Sizes = {"out_channels": int, "in_channels": lambda n: n // unit * inputs, "groups": lambda n: n // unit}
    return _lines(conv, {"weight": 0, "bias": 0}, sizes, conv.out_channels, unit)


def _of_vectors(layer: nn.Module) -> Lines:
    if isinstance(layer, nn.GroupNorm):
        unit = layer.num_channels // layer.num_groups
        sizes: Sizes = {"num_channels": int, "num_groups": lambda n: n // unit}
        return _lines(layer, {"weight": 0, "bias": 0}, sizes, layer.num_channels, unit)
    if isinstance(layer, _NormBase):
        return _of(layer, dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0), "num_features")
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        if len(layer.normalized_shape) != 1:
            shape = tuple(layer.normalized_shape)
            raise ValueError(f"a {type(layer).__name__} over {shape} cannot lose rows: only over one dimension")
        sizes = {"normalized_shape": lambda n: (n,)}
        return _lines(layer, {"weight": 0, "bias": 0}, sizes, layer.normalized_shape[0])
    if isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        return _of(layer, {"weight": 0}, "num_parameters")
    owned = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    lengths = {tuple(tensor.shape) for tensor in owned.values()}
    if "weight" in owned and len(lengths) == 1 and owned["weight"].dim() == 1:
        return Lines(dict.fromkeys(owned, 0), {}, len(owned["weight"]))
    raise TypeError(
        f"a {type(layer).__name__} cannot be cut: give a Linear, a convolution, an Embedding, a normalisation or a "
        "layer that owns nothing but vectors of one length"
    )
