"""The examples of README.md and the docs run as they are written, in the names a reader would have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)
        self.into, self.head = nn.Linear(64 * 16, 48), nn.Linear(48, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.into(self.norm(self.stem(x)).relu().flatten(1)).relu())
        return out


def decoder_names() -> dict[str, Any]:
    return {"model": tiny_model("llama-gqa", layers=2), "ids": torch.arange(24).view(2, 12)}


def net_names() -> dict[str, Any]:
    return {"model": Net(), "example_inputs": IMAGES, "loss_of": lambda model: model(IMAGES).square().mean()}


def block(page: str, word: str) -> str:
    """The one code block of a page that holds a word."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (only,) = (text for text in found if word in text)
    return str(only)


def test_scores_around_a_backward_pass() -> None:
    for page in ("README.md", "docs/kernels.md"):
        names = decoder_names()
        exec(block(page, "with record_importance(model) as recorder:"), names)
        assert names["scores"].keys() == {f"model.layers.{n}.{part}" for n in range(2) for part in ("self_attn", "mlp")}
        assert all((scores > 0).all() for scores in names["scores"].values())
    names = decoder_names()
    exec(block("docs/kernels.md", "with record_lines(model) as recorder:"), names)
    down = names["model"].model.layers[0].mlp.down_proj
    assert (len(names["rows"]), len(names["columns"])) == down.weight.shape


@pytest.mark.parametrize(
    ("page", "word"),
    [
        ("README.md", "import torch_pruning as tp"),
        ("docs/adapters.md", "for _ in range(5):"),
        ("docs/adapters.md", "dependency_groups(model"),
    ],
)
def test_a_stack_of_somebody_else(page: str, word: str) -> None:
    pytest.importorskip("torch_pruning", reason="needs Torch-Pruning: pip install '.[torch-pruning]'")
    names = net_names()
    before = sum(p.numel() for p in names["model"].parameters())
    exec(block(page, word), names)
    assert sum(p.numel() for p in names["model"].parameters()) < 0.8 * before
    assert torch.isfinite(names["model"](IMAGES)).all()
