"""Compensation on a GPU: the weights a CPU finds, and steps on the loss in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compensation_oracle import kept_of, weight_of
from tiny import tiny_model, tiny_tokens

from gisp.compensation import Compensation, CompensationOptions, fit_compensation
from gisp.compensation.pruned import batch_sizes, student
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


TRAINED = [{"method": name, "steps": 4, "batch_tokens": 256} for name in ("gates", "distil")]


@pytest.mark.parametrize("options", [{"method": "lsq"}, {"method": "kfac", "steps": 2}, *TRAINED])
def test_weights_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    here, there = fitted(tiny_model("llama-gqa"), **options), fitted(tiny_model("llama-gqa").cuda(), **options)
    for a, b in zip(here.updates, there.updates, strict=True):
        assert weight_of(b).is_cuda and torch.equal(a.columns, b.columns.cpu())
        assert float((weight_of(a) - weight_of(b).cpu()).abs().max()) < 2e-3 * float(weight_of(a).abs().max())
    for result, same in zip(here.results, there.results, strict=True):
        assert (result.kept, result.tokens, result.count) == (same.kept, same.tokens, same.count)
        assert (result.before, result.reached) == pytest.approx((same.before, same.reached), rel=1e-3)


@pytest.mark.parametrize("options", [{"method": "kfac", "steps": 2, "tokens": 256}, *TRAINED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_repeat_bit_for_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    one, other = (fitted(tiny_model("llama-gqa").to("cuda", dtype), **options) for _ in range(2))
    assert one.results == other.results
    assert all(weight_of(update).dtype == dtype for update in one.updates)
    assert all(torch.equal(weight_of(a), weight_of(b)) for a, b in zip(one.updates, other.updates, strict=True))


def test_batches_fill_the_memory_they_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa").cuda()
    model_map, keep = map_model(model), Keep.of(kept_of(model, REMOVED))
    rows = [(ids, ids) for ids in tiny_tokens(640, 32)]

    def shapes() -> list[list[tuple[int, ...]]]:
        return [[tuple(b.ids.shape) for b in group] for group in student.Student(model_map, keep).groups(rows)]

    assert shapes() == [[(512, 32)], [(128, 32)]]
    # Too few tokens for fast products: layers run again from their inputs, all batches in a layer before the next one.
    monkeypatch.setattr(batch_sizes, "_BATCH_BYTES", 1100 * 4 * 32 * 64)
    assert shapes() == [[(256, 32), (256, 32)], [(128, 32)]]
    monkeypatch.setattr(batch_sizes, "_BATCH_BYTES", 1)
    assert shapes() == [[(256, 32)], [(256, 32)], [(128, 32)]]
