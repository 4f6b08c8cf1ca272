"""Two GPUs over NCCL write the run of one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens

from gisp.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def prune(folder: Path, name: str, *given: str) -> tuple[dict[str, bytes], list[float]]:
    """What a run leaves: its tensors, and the loss of every step."""
    out = folder / name
    options = ["--steps", "6", "--sparsity", "0.4", "--align", "4", "--quiet"]
    options += [] if "exact" in given else ["--batch-tokens", "700"]
    places = [str(folder / "model"), "--data", str(folder / "t.safetensors"), "--out", str(out)]
    assert main(["prune", *places, *options, *given]) == 0
    record = json.loads((out / "trajectory.json").read_text())
    files = {path.name: path.read_bytes() for path in out.rglob("*.safetensors")}
    return files, [step["loss"] for step in record["steps"]]


@pytest.mark.parametrize("given", [(), ("--dtype", "float32"), ("--regrow", "1"), ("--engine", "exact")], ids=str)
def test_two_gpus_write_the_run_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    tiny_model("llama-gqa", hidden_size=128, intermediate_size=320, head_dim=32).save_pretrained(tmp_path / "model")
    save_file({"input_ids": tiny_tokens(200, 40)}, tmp_path / "t.safetensors")
    if "--engine" in given:
        given = (*given, "--batch-size", "16")
    one, losses = prune(tmp_path, "one", "--gpus", "1", *given)
    two, others = prune(tmp_path, "two", "--gpus", "2", *given)
    assert one == two and losses == others
