"""Structure groups: which rows and columns of which Linear layers belong to one removable structure.

A structure is an attention head or an MLP channel. All structures of one block form a group: they share the same
projections, and structure ``s`` owns the same index range in each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Axis = Literal["row", "column"]
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


@dataclass(frozen=True)
class Projection:
    """One Linear layer as seen by a group.

    Attributes:
        linear: the layer, ``weight`` of shape [out_features, in_features].
        axis: ``"row"``: structure ``s`` owns rows ``s*block : (s+1)*block`` and those entries of the bias;
            ``"column"``: it owns those columns, and the bias belongs to no structure.
        block: consecutive rows or columns per structure (head_dim for heads, 1 for channels; projections of one group
            may differ in it).
    """

    linear: nn.Linear
    axis: Axis
    block: int = 1

    def __post_init__(self) -> None:
        if self.axis not in ("row", "column"):
            raise ValueError(f"axis must be 'row' or 'column', got {self.axis!r}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")

    @property
    def width(self) -> int:
        """Current extent of the weight along ``axis``."""
        return self.linear.weight.shape[0 if self.axis == "row" else 1]


@dataclass(frozen=True)
class StructureGroup:
    """All structures of one block (the heads of one attention, the channels of one MLP).

    Attributes:
        kind: what its structures are; None for a group of your own.
    """

    name: str
    projections: tuple[Projection, ...]
    kind: GroupKind | None = None

    def __post_init__(self) -> None:
        if not self.projections:
            raise ValueError(f"group {self.name!r} has no projections")
        counts = {p.width / p.block for p in self.projections}
        if len(counts) != 1 or not counts.copy().pop().is_integer():
            shapes = ", ".join(f"{tuple(p.linear.weight.shape)} by {p.axis}s of {p.block}" for p in self.projections)
            raise ValueError(f"group {self.name!r}: projections disagree on the structure count: {shapes}")

    @property
    def count(self) -> int:
        """Number of structures at the current width."""
        return self.projections[0].width // self.projections[0].block


def attention_group(name: str, attention: Any, *, whole_kv_groups: bool = False) -> StructureGroup:
    """Heads of an attention module with ``q_proj, k_proj, v_proj, o_proj`` and ``head_dim``.

    With one key/value head per query head a head owns its rows of q, k and v and its columns of o. With shared
    key/value heads (GQA: ``num_key_value_groups`` above 1, or fewer rows in k than in q) it owns rows of q and columns
    of o only; pruned widths do not tell, since few query heads may be left on as many key/value heads.

    Args:
        whole_kv_groups: a structure is a key/value head with all query heads that share it: its rows of k and v, their
            rows of q and columns of o. The module must share its key/value heads evenly.
    """
    head_dim = int(attention.head_dim)
    heads, kv_heads = attention.q_proj.out_features // head_dim, attention.k_proj.out_features // head_dim
    shared = heads != kv_heads or getattr(attention, "num_key_value_groups", 1) != 1
    query_rows = head_dim
    if whole_kv_groups and kv_heads and heads % kv_heads == 0:
        query_rows = heads // kv_heads * head_dim
    elif whole_kv_groups:
        raise ValueError(f"group {name!r}: {heads} query heads do not share {kv_heads} key/value heads evenly")
    blocks = {"heads": query_rows, "kv_heads": head_dim}
    parts = tuple(
        Projection(getattr(attention, item.name), item.axis, blocks[item.kind])
        for item in projections_of("self_attn")
        if item.kind == "heads" or whole_kv_groups or not shared
    )
    return StructureGroup(name, parts, "heads")


def mlp_group(name: str, mlp: Any) -> StructureGroup:
    """Channels of a gated MLP: one row of ``gate_proj`` and ``up_proj``, one column of ``down_proj``."""
    parts = tuple(Projection(getattr(mlp, item.name), item.axis) for item in projections_of("mlp"))
    return StructureGroup(name, parts, "channels")


def _has_projections(module: nn.Module, of: str) -> bool:
    return all(isinstance(getattr(module, item.name, None), nn.Linear) for item in projections_of(of))


def iter_groups(model: nn.Module) -> Iterator[StructureGroup]:
    """Groups of every attention and gated MLP found in ``model``, in module order, by attribute names alone."""
    for name, module in model.named_modules():
        if _has_projections(module, "self_attn") and hasattr(module, "head_dim"):
            yield attention_group(name, module)
        elif _has_projections(module, "mlp"):
            yield mlp_group(name, module)
