"""Models of random weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.registry import MODELS
from benchmarks.common.synthetic import build_model, random_tokens

CPU = torch.device("cpu")
TINY = MODELS["tiny"]


def test_synthetic_models_are_reproducible_and_finite() -> None:
    one, other = (build_model(TINY, CPU, torch.bfloat16, seed=3) for _ in range(2))
    assert torch.get_default_dtype() == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in one.parameters())
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    ids = random_tokens(TINY, 2, 32)
    loss = one(input_ids=ids, labels=ids).loss
    assert float(loss.detach()) == pytest.approx(5.545, abs=0.2), "near the log of 256"
