"""A GPU that hangs over NCCL ends the others by name; one that is slow does not, nor those that wait for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from gisp.replicas import watch
from gisp.replicas.launch import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
_RUN = """
import sys, time
import torch
import gisp
from gisp.replicas import signs, watch
from gisp.replicas.environment import joined, rank
from gisp.run.setup import Setup
from tiny import tiny_model, tiny_tokens

# Limits that tests beside this one, on the same cores and GPUs, do not bring it to.
watch.BEAT, watch.SILENCE, watch.GRACE = 0.2, 6.0, 3.0
signs.STILL, signs.DEVICE_STILL, signs.PAUSE = 12.0, 12.0, 0.2
score = Setup.score


def scored(self, step):
    if step == 2 and rank() == 1:
        if sys.argv[1] == "hangs":
            # Minutes of a kernel that does nothing.
            for _ in range(60):
                torch.cuda._sleep(4 * 10**9)
        else:
            end = time.monotonic() + 30
            while time.monotonic() < end:
                torch.ones(1, device="cuda").cpu()
    return score(self, step)


Setup.score = scored
with joined("auto") as group:
    model = tiny_model("llama-gqa", hidden_size=128, intermediate_size=320, head_dim=32).cuda()
    options = {"sparsity": 0.3, "steps": 4, "align": 4, "batch_tokens": 700, "stages": int(sys.argv[2])}
    gisp.prune(model, tiny_tokens(200, 40), process_group=group, progress=False, **options)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "hanging.py").write_text(_RUN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)]))
    return "hanging"


@pytest.mark.parametrize("stages", ["1", "2"])
def test_a_gpu_that_hangs_is_named(run: str, stages: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, run, ["hangs", stages], "begin anew") == watch.EXIT_CODE
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1 (") and "is stuck, its GPU has done nothing for 12 s" in line


@pytest.mark.parametrize("stages", ["1", "2"])
def test_a_slow_one_is_waited_for(run: str, stages: str) -> None:
    assert launch(2, run, ["is slow", stages], "begin anew") == 0
