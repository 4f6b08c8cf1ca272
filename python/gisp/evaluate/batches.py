"""Sequences of any lengths in batches of similar ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

_TOKENS_PER_BATCH = {"cuda": 32768, "cpu": 4096}


def length_batches(lengths: Sequence[int], device: torch.device, batch_size: int | None = None) -> Iterator[list[int]]:
    """Numbers of the sequences of each batch, the longest first, so that memory runs out at once or not at all.

    Args:
        lengths: tokens of every sequence.
        batch_size: sequences per batch; ``None`` = as many as a token budget for the device allows.
    """
    budget = _TOKENS_PER_BATCH["cuda" if device.type == "cuda" else "cpu"]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = batch_size or max(1, budget // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size
