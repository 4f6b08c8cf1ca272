"""Structure groups: which rows and columns of which Linear layers belong to one removable structure.

A structure is an attention head or an MLP channel. All structures of one block form a group: they share the same
projections, and structure ``s`` owns the same index range in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from gisp_kernels.checks import check_block
from gisp_kernels.layers import lines_of

Axis = Literal["row", "column", "element"]
GroupKind = Literal["heads", "channels"]
Kind = Literal["heads", "kv_heads", "channels"]
KINDS: tuple[Kind, ...] = ("heads", "kv_heads", "channels")


@dataclass(frozen=True)
class LayerProjection:
    """One Linear layer of a decoder layer that is made of structures.

    Attributes:
        module, name: where it is in the decoder layer: ``module.name``.
        kind: what it holds a block of rows or columns of.
        axis: as for :class:`Projection`.
    """

    module: Literal["self_attn", "mlp"]
    name: str
    kind: Kind
    axis: Axis

    @property
    def dim(self) -> int:
        """Dimension of the weight along which the blocks lie."""
        return 0 if self.axis == "row" else 1

    @property
    def parts(self) -> tuple[str, ...]:
        """Parameters that belong to structures: the bias only where rows do."""
        return ("weight", "bias") if self.axis == "row" else ("weight",)

    def block(self, head_dim: int) -> int:
        """Rows or columns of one head or channel."""
        return 1 if self.kind == "channels" else head_dim


def check_axis(axis: Axis) -> None:
    """Require one of the axes along which a weight is scored.

    Raises:
        ValueError: it is none.
    """
    if axis not in get_args(Axis):
        raise ValueError(f"axis must be 'row', 'column' or 'element', got {axis!r}")


# Everything that groups, exporters and masks know of a decoder layer.
PROJECTIONS = (
    LayerProjection("self_attn", "q_proj", "heads", "row"),
    LayerProjection("self_attn", "k_proj", "kv_heads", "row"),
    LayerProjection("self_attn", "v_proj", "kv_heads", "row"),
    LayerProjection("self_attn", "o_proj", "heads", "column"),
    LayerProjection("mlp", "gate_proj", "channels", "row"),
    LayerProjection("mlp", "up_proj", "channels", "row"),
    LayerProjection("mlp", "down_proj", "channels", "column"),
)


def projections_of(module: str) -> tuple[LayerProjection, ...]:
    """The projections of ``self_attn`` or ``mlp``."""
    return tuple(item for item in PROJECTIONS if item.module == module)


@dataclass(frozen=True, eq=False)
class Projection:
    """One weight as seen by a group.

    The weight is read with its outputs first, [O, I], whatever way the module stores it (``Conv1D`` of transformers
    holds [I, O]). Experts in one tensor are [E, O, I]; their rows and columns are numbered expert by expert, so that
    row ``r`` of expert ``e`` is row ``e * O + r`` and column ``c`` column ``e * I + c``.

    Attributes:
        linear: the module that holds the weight, an ``nn.Linear`` as a rule.
        axis: ``"row"``: structure ``s`` owns rows ``s*block : (s+1)*block`` and those entries of the bias;
            ``"column"``: it owns those columns, and the bias belongs to no structure; ``"element"``: every element is
            a structure, in the order of [O, I].
        block: consecutive rows or columns per structure (head_dim for heads, 1 for channels; projections of one group
            may differ in it).
        index: in place of ``block``, int64 [structures, lines]: rows or columns of every structure, for fused weights
            (query, key and value in one, gate and up in one). Lines it leaves out belong to no structure.
        parameter: name of the weight in the module.

    Raises:
        TypeError: a block that is no whole number.
        ValueError: an unknown axis, or a block or index that does not fit.
    """

    linear: Any
    axis: Axis
    block: int = 1
    index: torch.Tensor | None = None
    parameter: str = "weight"

    def __post_init__(self) -> None:
        check_axis(self.axis)
        check_block(self.block)
        if self.index is not None:
            self._check_index(self.index)
        elif self.axis == "element" and self.block > 1:
            raise ValueError(f"elements stand alone: block must be 1, got {self.block}")

    def _check_index(self, index: torch.Tensor) -> None:
        if self.block > 1 or self.axis == "element":
            raise ValueError(f"index takes the place of block, by rows or columns: got block {self.block}, {self.axis}")
        if not isinstance(index, torch.Tensor) or index.dtype != torch.int64 or index.dim() != 2:
            raise ValueError("index must be an int64 tensor [structures, lines]")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.width:
            raise ValueError(f"index must name {self.axis}s from 0 to {self.width - 1}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Projection):
            return NotImplemented
        same_index = self.index is other.index or (
            self.index is not None and other.index is not None and torch.equal(self.index, other.index)
        )
        return same_index and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, str, int, str]:
        return id(self.linear), self.axis, self.block, self.parameter

    @property
    def weight(self) -> torch.Tensor:
        """[O, I] or [E, O, I], a view where the module stores it the other way round."""
        weight = getattr(self.linear, self.parameter)
        return weight.transpose(-1, -2) if is_transposed(self.linear) else weight

    @property
    def width(self) -> int:
        """Rows, columns or elements of the weight at present, those of all experts together.

        A layer that is no matrix has the outputs and inputs of :func:`gisp_kernels.layers.lines_of`.
        """
        if self.axis != "element" and not is_matrix(self.linear, self.parameter):
            return lines_of(self.linear, self.axis).count
        *experts, rows, columns = self.weight.shape
        lines = {"row": rows, "column": columns, "element": rows * columns}[self.axis]
        return lines * math.prod(experts)

    @property
    def count(self) -> float:
        """Structures at the current width; no whole number where the block does not divide it."""
        return self.width / self.block if self.index is None else len(self.index)


def is_matrix(module: nn.Module, parameter: str = "weight") -> bool:
    """Whether a module maps inputs to outputs by one matrix, or one for each of its experts."""
    weight = getattr(module, parameter, None)
    return weight is not None and weight.dim() in (2, 3) and not isinstance(module, (nn.Embedding, _ConvNd))


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores weights with inputs first: ``Conv1D`` and some stacked experts of transformers."""
    # A step asks every group, and nn.Module takes the host long to find that it has no such attribute.
    if type(module) is nn.Linear:
        return False
    return bool(getattr(module, "is_transposed", False)) or type(module).__name__ == "Conv1D"


@dataclass(frozen=True)
class StructureGroup:
    """All structures of one block (the heads of one attention, the channels of one MLP).

    Attributes:
        kind: what its structures are; None for a group of your own.

    Raises:
        TypeError: something else than a :class:`Projection`.
        ValueError: no projections, or projections that disagree on the number of structures.
    """

    name: str
    projections: tuple[Projection, ...]
    kind: GroupKind | None = None

    def __post_init__(self) -> None:
        for projection in self.projections:
            if not isinstance(projection, Projection):
                raise TypeError(f"group {self.name!r} must hold Projections, got {type(projection).__name__}")
        if not self.projections:
            raise ValueError(f"group {self.name!r} has no projections")
        counts = {p.count for p in self.projections}
        if len(counts) != 1 or not float(min(counts)).is_integer():
            shapes = ", ".join(
                f"{p.width} lines by {p.axis}s "
                + (f"of {p.block}" if p.index is None else f"of an index of {len(p.index)}")
                for p in self.projections
            )
            raise ValueError(f"group {self.name!r}: projections disagree on the structure count: {shapes}")

    @property
    def count(self) -> int:
        """Number of structures at the current width."""
        return int(self.projections[0].count)


# Names of query, key, value and output projection, and of the layers into and out of an MLP's channels, in the models
# of transformers and torch. The first of each are those of PROJECTIONS.
ATTENTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q", "k", "v", "o"),
)
MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("w1", "w3"), "w2"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("linear1",), "linear2"),
    (("c_fc",), "c_proj"),
    (("wi",), "wo"),
)


# What adapters of PEFT and torch.compile call the layer that they wrap.
WRAPPED = ("base_layer", "_orig_mod")


def unwrapped(module: Any) -> Any:
    """The layer inside adapters of PEFT and compiled modules (:data:`WRAPPED`); another module as it is."""
    while isinstance(module, nn.Module):
        inner = next((module._modules[name] for name in WRAPPED if module._modules.get(name) is not None), None)
        if inner is None:
            break
        module = inner
    return module


def layers_of(module: Any, names: Iterable[str]) -> list[Any] | None:
    """The Linear layers of these names in a module, or ``None`` where one is missing."""
    found = [unwrapped(getattr(module, name, None)) for name in names]
    fit = all(isinstance(item, nn.Linear) or type(item).__name__ == "Conv1D" for item in found)
    return found if fit else None


def _head_dim(attention: Any) -> int | None:
    head_dim = getattr(attention, "head_dim", getattr(attention, "key_value_proj_dim", None))
    return None if head_dim is None else int(head_dim)


def attention_layers(attention: Any) -> list[Any] | None:
    """Query, key, value and output projection of an attention module that has ``head_dim``, or ``None``."""
    found = (layers_of(attention, names) for names in ATTENTIONS)
    return next((layers for layers in found if layers), None) if _head_dim(attention) is not None else None


def mlp_layers(mlp: Any) -> tuple[list[Any], Any] | None:
    """The layers into an MLP's channels and the one out of them, or ``None``."""
    for into, out in MLPS:
        layers = layers_of(mlp, (*into, out))
        if layers:
            return layers[:-1], layers[-1]
    return None


def attention_group(name: str, attention: Any, *, whole_kv_groups: bool = False) -> StructureGroup:
    """Heads of an attention module that has ``head_dim`` and projections named as in :data:`ATTENTIONS`.

    With one key/value head per query head a head owns its rows of q, k and v and its columns of o. With shared
    key/value heads (GQA: ``num_key_value_groups`` above 1, or fewer rows in k than in q) it owns rows of q and columns
    of o only; pruned widths do not tell, since few query heads may be left on as many key/value heads.

    Args:
        whole_kv_groups: a structure is a key/value head with all query heads that share it: its rows of k and v, their
            rows of q and columns of o. The module must share its key/value heads evenly.

    Raises:
        ValueError: it has no such projections, or key/value heads that are not shared evenly.
    """
    layers, head_dim = attention_layers(attention), _head_dim(attention)
    if layers is None or head_dim is None:
        raise ValueError(f"group {name!r}: {type(attention).__name__} has no q, k, v and output projection of heads")
    query, key, value, output = layers
    heads, kv_heads = query.out_features // head_dim, key.out_features // head_dim
    shared = heads != kv_heads or getattr(attention, "num_key_value_groups", 1) != 1
    query_rows = head_dim
    if whole_kv_groups and kv_heads and heads % kv_heads == 0:
        query_rows = heads // kv_heads * head_dim
    elif whole_kv_groups:
        raise ValueError(f"group {name!r}: {heads} query heads do not share {kv_heads} key/value heads evenly")
    own = (key, value) if whole_kv_groups or not shared else ()
    parts = (
        Projection(query, "row", query_rows),
        *(Projection(linear, "row", head_dim) for linear in own),
        Projection(output, "column", query_rows),
    )
    return StructureGroup(name, parts, "heads")


def mlp_group(name: str, mlp: Any) -> StructureGroup:
    """Channels of an MLP with layers named as in :data:`MLPS`: a row of those into it, a column of the one out of it.

    Raises:
        ValueError: it has no such layers, or their widths differ.
    """
    layers = mlp_layers(mlp)
    if layers is None:
        raise ValueError(f"group {name!r}: {type(mlp).__name__} has no layers into and out of channels")
    into, out = layers
    parts = (*(Projection(linear, "row") for linear in into), Projection(out, "column"))
    return StructureGroup(name, parts, "channels")
