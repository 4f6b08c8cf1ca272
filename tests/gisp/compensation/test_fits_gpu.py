"""Compensation on a GPU: the weights a CPU fits, and K-FAC steps in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compensation_oracle import kept_of, weight_of
from tiny import tiny_model, tiny_tokens

from gisp.compensation import Compensation, CompensationOptions, fit_compensation, kfac
from gisp.data import Sequences
from gisp.model.keep import Keep
from gisp.model.structures import map_model

pytestmark = pytest.mark.gpu

REMOVED = {"layers.1.heads": torch.tensor([0, 2]), "layers.1.channels": torch.tensor([3, 4, 22, 23, 0])}
LENGTHS = (32, 17, 24, 32, 9, 32) * 6


def fitted(model: Any, **options: Any) -> Compensation:
    ids = tiny_tokens(len(LENGTHS), max(LENGTHS), seed=5)
    data = Sequences.plain([(row[:n], row[:n].clone()) for row, n in zip(ids, LENGTHS, strict=True)])
    return fit_compensation(map_model(model), Keep.of(kept_of(model, REMOVED)), data, CompensationOptions(**options))


@pytest.mark.parametrize("options", [{"method": "lsq"}, {"method": "kfac", "steps": 2}])
def test_weights_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    options = {"tokens": 256, **options}
    here, there = fitted(tiny_model("llama-gqa"), **options), fitted(tiny_model("llama-gqa").cuda(), **options)
    for a, b in zip(here.updates, there.updates, strict=True):
        assert weight_of(b).is_cuda and torch.equal(a.columns, b.columns.cpu())
        assert float((weight_of(a) - weight_of(b).cpu()).abs().max()) < 1e-3 * float(weight_of(a).abs().max())
    for step, same in zip(here.steps, there.steps, strict=True):
        assert step.size == pytest.approx(same.size) and step.tokens == same.tokens
        assert (step.before, step.after) == pytest.approx((same.before, same.after), rel=1e-4)


def test_steps_in_bfloat16() -> None:
    found = fitted(tiny_model("llama-gqa").to("cuda", torch.bfloat16), method="kfac", steps=2, tokens=256)
    assert all(weight_of(update).dtype == torch.bfloat16 for update in found.updates)
    assert found.steps[-1].after < found.steps[0].before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    one, other = (
        fitted(tiny_model("llama-gqa").to("cuda", dtype), method="kfac", steps=2, tokens=256) for _ in range(2)
    )
    assert one.steps == other.steps
    assert all(torch.equal(weight_of(a), weight_of(b)) for a, b in zip(one.updates, other.updates, strict=True))


def test_batches_fill_the_memory_they_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    model_map = map_model(tiny_model("llama-gqa").cuda())
    rows = [(ids, ids) for ids in tiny_tokens(64, 32)]
    assert [batch.ids.shape for batch in kfac._batches(model_map, rows)] == [(64, 32)]
    monkeypatch.setattr(kfac, "_BATCH_BYTES", 1)
    assert [batch.ids.shape for batch in kfac._batches(model_map, rows)] == [(8, 32)] * 8
