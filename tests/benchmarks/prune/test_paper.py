"""A step of the paper's way."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.registry import MODELS
from benchmarks.common.synthetic import build_model, random_tokens
from benchmarks.prune.paper import run_hours, time_paper_step

CPU = torch.device("cpu")
TINY = MODELS["tiny"]


def test_paper_step_leaves_no_gradient_behind() -> None:
    model = build_model(TINY, CPU, torch.float32)
    found = time_paper_step(model, random_tokens(TINY, 4, 256), batches=2)
    assert all(p.grad is None for p in model.parameters())
    assert found["hours"] == run_hours(found["tokens_per_second"], found["extraction_seconds"])
    assert found["peak_bytes"] is None


def test_hours_of_the_papers_schedule() -> None:
    # 280 steps of 512,000 tokens.
    assert run_hours(512_000, 0) == pytest.approx(280 / 3600)
    assert run_hours(512_000, 1) == pytest.approx(560 / 3600)
