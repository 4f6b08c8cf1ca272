"""Stages over NCCL write the run of one GPU."""

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
    # More steps than lie between two looks at the borders.
    options = ["--steps", "24", "--sparsity", "0.5", "--align", "4", "--quiet"]
    # Left to themselves, stages take twice the slices, whose sums round differently.
    options += ["--slices", "8"] if "--gpus" in given else []
    options += [] if "exact" in given else ["--batch-tokens", "2000"]
    places = [str(folder / "model"), "--data", str(folder / "t.safetensors"), "--out", str(out)]
    assert main(["prune", *places, *options, *given]) == 0
    record = json.loads((out / "trajectory.json").read_text())
    files = {path.name: path.read_bytes() for path in out.rglob("*.safetensors")}
    return files, [step["loss"] for step in record["steps"]]


@pytest.mark.parametrize("given", [(), ("--dtype", "float32"), ("--engine", "exact", "--batch-size", "16")], ids=str)
def test_stages_write_the_run_of_one_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    model = tiny_model("llama-gqa", layers=12, hidden_size=128, intermediate_size=320, head_dim=32)
    model.save_pretrained(tmp_path / "model")
    save_file({"input_ids": tiny_tokens(200, 40)}, tmp_path / "t.safetensors")
    one = prune(tmp_path, "one", "--gpus", "1", *given)
    assert prune(tmp_path, "two", "--gpus", "2", "--stages", "2", *given) == one
    if torch.cuda.device_count() >= 4:
        assert prune(tmp_path, "four", "--gpus", "4", "--stages", "4", *given) == one
        assert prune(tmp_path, "rows", "--gpus", "4", "--stages", "2", *given) == one


def test_stages_measure_as_one_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    model = tiny_model("llama-gqa", layers=12, hidden_size=128, intermediate_size=320, head_dim=32)
    model.save_pretrained(tmp_path / "model")
    save_file({"input_ids": tiny_tokens(200, 40)}, tmp_path / "t.safetensors")
    prune(tmp_path, "one")
    given = ["eval", str(tmp_path / "one"), "--data", str(tmp_path / "t.safetensors"), "--batch-size", "16"]
    found = []
    for more in ([], ["--stages", "2"], *([["--stages", "4"]] if torch.cuda.device_count() >= 4 else [])):
        capfd.readouterr()
        assert main([*given, "--sparsities", "0.2,0.5", "--out", str(tmp_path / "figures.json"), *more]) == 0
        found.append((tmp_path / "figures.json").read_text())
    assert len({*found}) == 1
