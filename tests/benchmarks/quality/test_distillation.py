"""The loss of a distilled cell."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_tokens

from benchmarks.quality.distillation import Distillation


def test_distillation_is_the_divergence_from_the_dense_model() -> None:
    dense, pruned, tokens = tiny_model(seed=1).double(), tiny_model(seed=2).double(), tiny_tokens(3)
    labels = tokens.clone()
    labels[:, :6] = -100
    found = Distillation(dense, 0.25)(pruned, tokens, labels)
    for row in range(3):
        p, q = (torch.softmax(model(tokens[row : row + 1]).logits[0, 5:-1], -1) for model in (dense, pruned))
        divergence = (p * (p / q).log()).sum(-1).mean()
        nll = -q.gather(1, tokens[row, 6:, None]).log().mean()
        assert float(found[row]) == pytest.approx(float(0.25 * divergence + 0.75 * nll), rel=1e-4)
    assert Distillation(dense, 1.0)(dense, tokens, labels).abs().max() < 1e-6
