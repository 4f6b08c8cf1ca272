"""A tiny decoder with its token files."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    model = tiny_model("llama-gqa", layers=4, intermediate_size=128, max_position_embeddings=128)
    model.save_pretrained(folder / "model")
    for name, rows in (("calibration", 12), ("evaluation", 6)):
        save_file({"input_ids": tiny_tokens(rows, 104, seed=len(name))}, folder / f"{name}.safetensors")
    return folder
