"""A tiny run with layers in host memory, beside the plain one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.registry import MODELS
from benchmarks.common.synthetic import build_filled
from benchmarks.prune import offload
from gisp.cli import main


def test_both_runs_are_timed_and_are_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    asked = ["bench", "prune", "--model", "tiny", "--device", "cpu", "--steps", "3", "--offload"]
    assert main([*asked, "--layers", "6", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    (run,) = json.loads(out.read_text())["offload"]
    assert run["same_run"] is True and run["layers"] == run["streamed_layers"] == 6
    assert run["ratio"] > 0
    # Two steps, each twice through all layers but for the two at the turn; the first step also checks the pass.
    model = build_filled(MODELS["tiny"], torch.device("cpu"), torch.float32)
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    assert 10 * layer < run["bytes"] <= 20 * layer
    # A CPU copies first and computes then.
    assert run["overlap"] == pytest.approx(0) and run["transfer_seconds"] == pytest.approx(run["exposed_seconds"])
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith("tiny ")] == ["true"]
    assert main(["bench", "prune", "--from", str(out)]) == 0
    assert "6 of 6" in capsys.readouterr().out


def test_what_fits_is_not_moved(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "prune", "--model", "tiny", "--device", "cpu", "--steps", "1", "--offload"]
    assert main([*asked, "--gpu-memory", "1GB"]) == 0
    assert "it fits, nothing was moved" in capsys.readouterr().out


def test_a_run_out_of_memory_keeps_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = offload.timed_run

    def fails_when_offloaded(*given: Any, **place: Any) -> Any:
        if place:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore lines.")
        return timed(*given)

    monkeypatch.setattr(offload, "timed_run", fails_when_offloaded)
    out = tmp_path / "r.json"
    asked = ["bench", "prune", "--model", "tiny", "--device", "cpu", "--steps", "1", "--offload", "--out", str(out)]
    assert main(asked) == 1
    (run,) = json.loads(out.read_text())["offload"]
    assert run["error"] == "CUDA out of memory." and run["resident"]["steps"] == 1
    assert "CUDA out of memory." in capsys.readouterr().out


def test_weights_depend_on_their_names_alone() -> None:
    models = [build_filled(MODELS["tiny"], torch.device("cpu"), torch.float32) for _ in range(2)]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    layers = models[0].model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert bool((models[0].model.norm.weight == 1).all())
    with torch.no_grad():
        assert bool(models[0](torch.arange(8)[None]).logits.isfinite().all())
