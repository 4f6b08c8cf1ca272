"""What a run folder holds, read with nothing of the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from . import oracle


def read_json(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "trajectory.json").read_text())
    return content


def read_removal(run: Path) -> oracle.Removal:
    tensors = load_file(run / "trajectory.safetensors")
    layers = len(tensors) // 2
    return oracle.Removal(
        [tensors[f"layers.{i}.heads.removed_at"].tolist() for i in range(layers)],
        [tensors[f"layers.{i}.channels.removed_at"].tolist() for i in range(layers)],
    )
