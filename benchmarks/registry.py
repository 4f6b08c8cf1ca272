"""Shapes that occur when real models are pruned: projections, token counts, and widths halfway through."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Dimensions of a decoder layer."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int


@dataclass(frozen=True)
class Case:
    """One weight to score: a projection of a model with some of its structures already removed.

    Attributes:
        model: model name.
        projection: name of the Linear layer.
        rows, width: shape of the weight at this point, [rows, width].
        axis, block: which rows or columns form a structure.
        kept: fraction of the structures still there.
    """

    model: str
    projection: str
    rows: int
    width: int
    axis: str
    block: int
    kept: float

    @property
    def label(self) -> str:
        return f"{self.model} {self.projection} {self.rows}x{self.width}"


MODELS = {
    "llama-2-13b": Model(hidden=5120, heads=40, kv_heads=40, head_dim=128, channels=13824),
    "llama-3-8b": Model(hidden=4096, heads=32, kv_heads=8, head_dim=128, channels=14336),
}
TOKENS = (512, 2048, 8192, 32768)
# Dense, and two points of a run down to one half. Channels stay at a multiple of 16, heads at whole heads.
KEPT = (1.0, 0.73, 0.52)
WIDTH_MULTIPLE = 16


def cases(model_name: str, kept: float = 1.0) -> list[Case]:
    """Scored projections of a model of which a fraction ``kept`` of every layer's structures is left.

    With shared key/value heads (GQA) q and o alone are scored. Projections of equal shape are listed once.
    """
    model = MODELS[model_name]
    heads = max(1, round(model.heads * kept))
    channels = max(WIDTH_MULTIPLE, round(model.channels * kept) // WIDTH_MULTIPLE * WIDTH_MULTIPLE)
    attention = "qkv" if model.heads == model.kv_heads else "q"
    hidden, head_rows = model.hidden, heads * model.head_dim
    return [
        Case(model_name, attention, head_rows, hidden, "row", model.head_dim, kept),
        Case(model_name, "o", hidden, head_rows, "column", model.head_dim, kept),
        Case(model_name, "gate/up", channels, hidden, "row", 1, kept),
        Case(model_name, "down", hidden, channels, "column", 1, kept),
    ]


def all_cases() -> list[Case]:
    """Every model at every point of :data:`KEPT`."""
    return [case for kept in KEPT for name in MODELS for case in cases(name, kept)]


def quick_cases() -> list[Case]:
    """A few cases that cover both axes, heads and channels, dense and halfway."""
    dense, half = cases("llama-2-13b"), cases("llama-2-13b", KEPT[1])
    return [dense[0], dense[2], dense[3], half[2]]
