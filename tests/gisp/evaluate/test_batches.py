"""Memory of an evaluation follows tokens times vocabulary, whatever the number of sequences asked for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import tiny_model

from gisp.data import Sequences
from gisp.evaluate import batches, perplexity
from gisp.evaluate.batches import length_batches
from gisp.evaluate.pairs import Request, log_likelihoods

# Four windows of 64 tokens have as many logits as a batch may; the bounds in use have a test below.
LARGE = 2**11
LENGTH, COUNT = 64, 12
BOUND = 2**19


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A model with a vocabulary large for its bound, and what its passes found: logits made and logits still held."""
    monkeypatch.setitem(batches._LOGITS_PER_BATCH, "cpu", BOUND)
    model = tiny_model("llama-mha", layers=1, vocab_size=LARGE)
    made: list[int] = []
    held: list[int] = []
    alive: list[Any] = []

    def before(*_: Any) -> None:
        gc.collect()
        held.append(sum(reference() is not None for reference in alive))

    def after(_: Any, __: Any, logits: torch.Tensor) -> None:
        made.append(logits.numel())
        alive.append(weakref.ref(logits))

    model.register_forward_pre_hook(before)
    model.lm_head.register_forward_hook(after)
    # What was there before need not be looked through at every pass.
    gc.collect()
    gc.freeze()
    yield model, made, held
    gc.unfreeze()


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return list(torch.randint(0, LARGE, (COUNT, LENGTH), generator=generator))


@pytest.mark.parametrize("batch_size", [None, COUNT])
def test_perplexity_and_likelihoods_stay_within_the_bound(batch_size: int | None, watched: Any) -> None:
    model, made, held = watched
    perplexity(model, Sequences.plain([(ids, ids) for ids in rows()]), LENGTH, batch_size=batch_size)
    requests = [Request(tuple(ids[:-1].tolist()), tuple(ids[-3:].tolist()), False) for ids in rows()]
    values = log_likelihoods(model, requests, batch_size)
    assert len(made) == 2 * COUNT // 4 and max(made) == BOUND
    assert not any(held)
    assert values == pytest.approx(log_likelihoods(model, requests, 1), rel=1e-5)


@pytest.mark.parametrize(("kind", "logits"), [("cpu", 2**25), ("cuda", 2**27)])
def test_batches_are_cut_at_the_smallest_of_their_bounds(kind: str, logits: int) -> None:
    device, lengths = torch.device(kind), [100] * 500 + [7, 3]
    for vocab_size in (96, 32000, 262144):
        batches = list(length_batches(lengths, device, 400, vocab_size))
        assert sorted(number for batch in batches for number in batch) == list(range(502))
        assert len(batches[0]) == min(400, logits // (100 * vocab_size))
    # One sequence is a batch, however long.
    assert next(length_batches([9, 5000], device, None, 262144)) == [1]
