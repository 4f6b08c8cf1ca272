"""Shapes that occur when real models are pruned: projections, token counts, and widths halfway through."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Dimensions of a decoder; ``tied``: whether embeddings and output projection are one weight."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    vocabulary: int
    tied: bool = False

    @property
    def shares_kv(self) -> bool:
        """Whether several query heads share a key/value head (GQA)."""
        return self.heads != self.kv_heads


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
    "llama-2-13b": Model(40, hidden=5120, heads=40, kv_heads=40, head_dim=128, channels=13824, vocabulary=32000),
    "llama-3-8b": Model(32, hidden=4096, heads=32, kv_heads=8, head_dim=128, channels=14336, vocabulary=128256),
    "llama-2-7b": Model(32, hidden=4096, heads=32, kv_heads=32, head_dim=128, channels=11008, vocabulary=32000),
    "llama-3-70b": Model(80, hidden=8192, heads=64, kv_heads=8, head_dim=128, channels=28672, vocabulary=128256),
    "smollm2-135m": Model(30, hidden=576, heads=9, kv_heads=3, head_dim=64, channels=1536, vocabulary=49152, tied=True),
    "tiny": Model(4, hidden=64, heads=4, kv_heads=2, head_dim=16, channels=128, vocabulary=256),
}
REAL = ("llama-2-13b", "llama-3-8b")
TOKENS = (512, 2048, 8192, 32768)
# Dense, and two points of a run down to one half. Channels stay at a multiple of 16, heads at whole heads.
DENSE, MIDWAY, HALF = 1.0, 0.73, 0.52
WIDTH_MULTIPLE = 16
# An odd width and the multiple of 16 below it: what a run without aligned widths pays.
ODD_WIDTH, EVEN_WIDTH = 13817, 13808


def kept_heads(model: Model, kept: float) -> int:
    """Heads of a layer that keeps a fraction of them."""
    return max(1, round(model.heads * kept))


def kept_channels(model: Model, kept: float) -> int:
    """Channels of a layer that keeps a fraction of them, a multiple of 16."""
    return max(WIDTH_MULTIPLE, round(model.channels * kept) // WIDTH_MULTIPLE * WIDTH_MULTIPLE)


def cases(model_name: str, kept: float = DENSE) -> list[Case]:
    """Scored projections of a model of which a fraction ``kept`` of every layer's structures is left.

    With shared key/value heads (GQA) q and o alone are scored. Projections of equal shape are listed once.
    """
    model = MODELS[model_name]
    channels = kept_channels(model, kept)
    attention = "q" if model.shares_kv else "qkv"
    hidden, head_rows = model.hidden, kept_heads(model, kept) * model.head_dim
    return [
        Case(model_name, attention, head_rows, hidden, "row", model.head_dim, kept),
        Case(model_name, "o", hidden, head_rows, "column", model.head_dim, kept),
        Case(model_name, "gate/up", channels, hidden, "row", 1, kept),
        Case(model_name, "down", hidden, channels, "column", 1, kept),
    ]


def odd_cases() -> list[Case]:
    """MLP weights of the 13B at an odd width and at the multiple of 16 below it."""
    hidden = MODELS["llama-2-13b"].hidden
    return [
        case
        for width in (ODD_WIDTH, EVEN_WIDTH)
        for case in (
            Case("llama-2-13b", "gate/up", width, hidden, "row", 1, DENSE),
            Case("llama-2-13b", "down", hidden, width, "column", 1, DENSE),
        )
    ]


def quick_cases() -> list[Case]:
    """A few cases that cover both axes, heads and channels, dense and midway."""
    dense, midway = cases("llama-2-13b"), cases("llama-2-13b", MIDWAY)
    return [dense[0], dense[2], dense[3], midway[2]]
