"""Two GPUs over NCCL measure and compensate what one does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_cases import byte_tokenizer, write_rows
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokens

from gisp.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
METHODS = ("lsq", "kfac", "gates", "distil")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its run and data, in bfloat16."""
    root = tmp_path_factory.mktemp("gpus")
    shape = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32}
    tiny_model("llama-gqa", **shape).to(torch.bfloat16).save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    save_file({"input_ids": tiny_tokens(200, 40)}, root / "tokens.safetensors")
    words = ("cab", "bag", "tab", "12", "x", "abab", "no", "it")
    write_rows(
        root / "choices.jsonl",
        [{"context": f"a {w}", "choices": [" cab", " bag", " no"], "answer": i % 3} for i, w in enumerate(words)],
    )
    write_rows(root / "prompts.jsonl", [{"prompt": f"a {w} is", "completion": " a cab"} for w in words])
    options = ["--steps=6", "--sparsity=0.4", "--align=4", "--batch-tokens=700", "--quiet"]
    given = ["prune", str(root / "model"), f"--data={root / 'tokens.safetensors'}", f"--out={root / 'run'}", *options]
    assert main(given) == 0
    return root


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def evaluated(capfd: pytest.CaptureFixture[str], *given: str) -> Any:
    capfd.readouterr()
    assert main(["eval", *given, "--json", "--quiet"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("data", ["tokens.safetensors", "choices.jsonl", "prompts.jsonl"])
def test_figures_are_those_of_one_gpu(places: Path, data: str, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--generate", "--max-new-tokens=5"] if data == "prompts.jsonl" else []
    asked = [str(places / "run"), "--sparsities=0.2,0.4", f"--data={places / data}", "--batch-size=3", *more]
    alone = evaluated(capfd, *asked)
    assert evaluated(capfd, *asked, "--gpus=2") == evaluated(capfd, *asked, "--gpus=1") == alone


@pytest.mark.parametrize("method", METHODS)
def test_compensations_are_those_of_one_gpu(
    places: Path, tmp_path: Path, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = {"kfac": ["--compensation-steps=2", "--calibration-tokens=2000"], "lsq": []}
    few = steps.get(method, ["--compensation-steps=4", "--compensation-batch-tokens=500"])
    found = {}
    for gpus in ("1", "2"):
        out = tmp_path / gpus
        given = [f"--compensate={method}", f"--calibration={places / 'tokens.safetensors'}", *few, f"--gpus={gpus}"]
        capfd.readouterr()
        assert main(["export", str(places / "run"), "--sparsity=0.4", f"--out={out}", *given, "--quiet"]) == 0
        printed = capfd.readouterr().out.replace(str(out), "OUT")
        found[gpus] = printed, {path.name: path.read_bytes() for path in out.rglob("*.safetensors")}
    assert found["1"] == found["2"]
