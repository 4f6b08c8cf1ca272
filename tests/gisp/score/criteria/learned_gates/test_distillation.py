"""Losses and their gradient against autograd, with padding, unscored tokens and weights, for every chunk."""

from __future__ import annotations

import pytest
import torch
from score_cases import ragged
from tiny import VOCAB

from gisp.score.criteria.learned_gates import distillation
from gisp.score.criteria.learned_gates.distillation import distilled

WEIGHTS = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_losses_and_gradient(chunk: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "CHUNK_ELEMENTS", chunk * VOCAB)
    data = ragged()
    labels = data.batch(list(range(5)))[1]
    logits = (torch.randn(5, labels.shape[1], VOCAB) * 3).requires_grad_()
    dense = torch.randn(5, labels.shape[1], VOCAB) * 3
    nll, dense_nll, divergence = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for i, (_, row) in enumerate(data.rows):
        at = (row[1:] != -100).nonzero()[:, 0]
        p, q = (x[i, at].double().log_softmax(-1) for x in (logits, dense))
        target = row[at + 1, None]
        nll = nll - WEIGHTS[i].double() * p.gather(1, target).mean()
        dense_nll = dense_nll - WEIGHTS[i].double() * q.gather(1, target).mean()
        divergence = divergence + WEIGHTS[i].double() * (q.exp() * (q - p)).sum(1).mean()
    (expected,) = torch.autograd.grad(nll + factor * divergence, logits)
    found = distilled(logits, dense, labels, WEIGHTS, factor)
    for value, truth in ((found.nll, nll), (found.dense_nll, dense_nll), (found.divergence, divergence)):
        assert value.item() == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(found.grad, expected, rtol=1e-4, atol=1e-7)
    assert found.grad[labels.roll(-1, 1) == -100].abs().max() == 0


def test_the_same_model_diverges_by_nothing() -> None:
    labels = ragged().batch(list(range(5)))[1]
    logits = torch.randn(5, labels.shape[1], VOCAB)
    found = distilled(logits, logits.clone(), labels, WEIGHTS, 2.0)
    assert found.divergence == 0 and found.nll == found.dense_nll
