"""Sequences of any lengths in batches of similar ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from gisp.progress import task
from gisp.replicas.sharing import sharers

Result = TypeVar("Result")

_TOKENS_PER_BATCH = {"cuda": 32768, "cpu": 4096}
# Logits of a batch, tokens times vocabulary: of a large vocabulary they are the largest tensor of an evaluation.
_LOGITS_PER_BATCH = {"cuda": 2**27, "cpu": 2**25}


def length_batches(
    lengths: Sequence[int], device: torch.device, batch_size: int | None = None, vocab_size: int = 1
) -> Iterator[list[int]]:
    """Numbers of the sequences of each batch, the longest first, so that memory runs out at once or not at all.

    Args:
        lengths: tokens of every sequence.
        batch_size: sequences per batch, fewer where their logits are too many; ``None`` = as many as a budget of
            tokens for the device allows.
        vocab_size: logits of each token of a batch. A single sequence is a batch however many it has.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        size = min(batch_size or _TOKENS_PER_BATCH[kind] // longest, _LOGITS_PER_BATCH[kind] // (vocab_size * longest))
        yield order[start : start + max(1, size)]
        start += max(1, size)


def each_batch(what: str, batches: Iterable[list[int]], work: Callable[[list[int]], Result]) -> list[Result]:
    """What becomes of every batch, in their order; processes that share the evaluation take turns.

    Args:
        what: as progress calls it.
        work: makes JSON of a batch.
    """
    listed = list(batches)
    with task(what, sum(map(len, listed))) as progress:
        return sharers().each(listed, work, lambda batch: progress.advance(len(batch)))


def vocabulary(model: Any) -> int:
    """Logits a causal language model gives for every token."""
    return int(model.get_input_embeddings().num_embeddings)
