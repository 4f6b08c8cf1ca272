"""Small models of every layer that can be cut, with their groups, for compaction and adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from gisp_kernels import Projection, StructureGroup


@dataclass
class Case:
    """A model in float64 and evaluation mode, an input, its groups and two steps of removals."""

    model: Any
    input: torch.Tensor
    groups: list[StructureGroup]
    steps: list[dict[str, list[int]]]

    def output(self) -> torch.Tensor:
        result: torch.Tensor = self.model(self.input)
        return result

    def mask(self, removed: Mapping[str, list[int]]) -> None:
        """Zero what reads the outputs of removed structures."""
        with torch.no_grad():
            for group in self.groups:
                for projection in group.projections:
                    if projection.axis == "column":
                        self._zero(projection, removed.get(group.name, []))

    @staticmethod
    def _zero(projection: Projection, structures: list[int]) -> None:
        layer = projection.linear
        index = projection.index
        if index is None:
            index = torch.arange(projection.width).view(-1, projection.block)
        lines = index[structures].flatten()
        transposed = isinstance(layer, (Conv1D, nn.ConvTranspose2d, nn.Embedding))
        layer.weight.index_fill_(0 if transposed else 1, lines, 0)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.slope = nn.PReLU(8)
        self.second = nn.Conv2d(8, 5, 3)
        self.head = nn.Linear(5 * 4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.slope(self.depthwise(self.norm(self.first(x))))
        out: torch.Tensor = self.head(self.second(x).flatten(1))
        return out


def convolutions(channels_last: bool = False) -> Case:
    model = Convolutions()
    nn.init.normal_(model.norm.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(model.norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    nn.init.normal_(model.slope.weight)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    early = (model.first, model.norm, model.depthwise, model.slope)
    groups = [
        StructureGroup("early", (*(Projection(m, "row") for m in early), Projection(model.second, "column"))),
        StructureGroup("late", (Projection(model.second, "row"), Projection(model.head, "column", 4))),
    ]
    steps = [{"early": [0, 5], "late": [1]}, {"early": [7, 2, 3], "late": [4, 2]}]
    return Case(model, torch.randn(2, 3, 6, 6), groups, steps)


def norm_groups() -> Case:
    first, norm = nn.Conv1d(4, 12, 3), nn.GroupNorm(4, 12)
    grouped, last = nn.Conv1d(12, 12, 1, groups=2), nn.Conv1d(12, 4, 2)
    nn.init.normal_(norm.weight)
    rows = tuple(Projection(layer, "row", 6) for layer in (first, norm, grouped))
    halves = StructureGroup("halves", (*rows, Projection(last, "column", 6)))
    return Case(nn.Sequential(first, norm, grouped, last), torch.randn(2, 4, 9), [halves], [{}, {"halves": [0]}])


def transposed() -> Case:
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 2, 3))
    group = StructureGroup("inner", (Projection(model[0], "row"), Projection(model[2], "column")))
    return Case(model, torch.randn(2, 3, 4, 4), [group], [{"inner": [1]}, {"inner": [5, 0]}])


class FusedAttention(nn.Module):
    """Attention of four heads with query, key and value in one ``Conv1D``, and a gated MLP with gate and up in one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = Conv1D(24, 7), Conv1D(7, 8)
        self.gate_up, self.down = nn.Linear(7, 18), nn.Linear(9, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: torch.Tensor = x + self.down(F.silu(gate) * up)
        return out


def fused() -> Case:
    model = FusedAttention()
    heads = torch.arange(24).view(3, 4, 2).transpose(0, 1).flatten(1)
    channels = torch.arange(18).view(2, 9).t()
    nn.init.normal_(model.qkv.bias)
    groups = [
        StructureGroup("heads", (Projection(model.qkv, "row", index=heads), Projection(model.out, "column", 2))),
        StructureGroup("mlp", (Projection(model.gate_up, "row", index=channels), Projection(model.down, "column"))),
    ]
    steps = [{"heads": [2], "mlp": [0, 4, 8]}, {"mlp": [3, 1], "heads": [0]}]
    return Case(model, torch.randn(2, 5, 7), groups, steps)


class Residual(nn.Module):
    """A residual stream from an embedding to tied output weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        out: torch.Tensor = self.head(x + self.mix(x))
        return out


def hidden() -> Case:
    model = Residual()
    rows, columns = (model.embed, model.mix), (model.mix, model.head)
    group = StructureGroup(
        "hidden", (*(Projection(m, "row") for m in rows), *(Projection(m, "column") for m in columns))
    )
    return Case(model, torch.randint(11, (2, 5)), [group], [{"hidden": [4]}, {"hidden": [0, 2]}])


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(5, 4), nn.Linear(5, 6), nn.Linear(11, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(torch.cat([self.left(x), x[:, :1], self.right(x)], -1).tanh())
        return out


def concatenated() -> Case:
    model = Concatenated()
    places = torch.arange(11)[:, None]
    groups = [
        StructureGroup("left", (Projection(model.left, "row"), Projection(model.out, "column", index=places[:4]))),
        StructureGroup("right", (Projection(model.right, "row"), Projection(model.out, "column", index=places[5:]))),
    ]
    return Case(model, torch.randn(3, 5), groups, [{"left": [1], "right": [5]}, {"right": [0, 2], "left": [3]}])


CASES: dict[str, Callable[[], Case]] = {
    "convolutions": convolutions,
    "channels last": lambda: convolutions(True),
    "groups of channels": norm_groups,
    "transposed": transposed,
    "fused": fused,
    "hidden": hidden,
    "concatenated": concatenated,
}


def case(name: str) -> Case:
    """A case with the same weights every time."""
    torch.manual_seed(0)
    found = CASES[name]()
    found.model.double().eval()
    if found.input.is_floating_point():
        found.input = found.input.double()
    return found
