"""Perplexity of a model on token sequences, with a stated window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from gisp.data import Sequences
from gisp.errors import GispError
from gisp.objectives import IGNORED, evaluation_mode, sequence_nll

_TOKENS_PER_BATCH = {"cuda": 32768, "cpu": 4096}


@dataclass(frozen=True)
class Perplexity:
    """exp(mean NLL) over ``tokens`` predicted tokens, in windows of at most ``window`` tokens."""

    perplexity: float
    tokens: int
    window: int


def perplexity(model: nn.Module, data: Sequences, window: int = 128) -> Perplexity:
    """Perplexity over all predicted tokens; rows longer than ``window`` are cut into windows.

    Every window starts afresh: its first token is context only.

    Raises:
        GispError: ``window`` below 2, nothing to predict, or a mixture, whose tasks are to be measured one by one.
    """
    if data.parts:
        raise GispError(f"a mixture of {len(data.parts)} tasks has no perplexity: give the data of one of them")
    if window < 2:
        raise GispError(f"--window is {window}: give at least 2")
    device = next(model.parameters()).device
    by_length: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for ids, labels in data.rows:
        for piece in zip(ids.split(window), labels.split(window), strict=True):
            if bool((piece[1][1:] != IGNORED).any()):
                by_length.setdefault(len(piece[0]), []).append(piece)
    total, tokens = 0.0, 0
    with evaluation_mode(model), torch.no_grad():
        for length, pieces in sorted(by_length.items()):
            size = max(1, _TOKENS_PER_BATCH["cuda" if device.type == "cuda" else "cpu"] // length)
            for start in range(0, len(pieces), size):
                ids = torch.stack([piece[0] for piece in pieces[start : start + size]]).to(device)
                labels = torch.stack([piece[1] for piece in pieces[start : start + size]]).to(device)
                counts = (labels[:, 1:] != IGNORED).sum(1)
                total += float((sequence_nll(model, ids, labels).double() * counts).sum())
                tokens += int(counts.sum())
    if tokens == 0:
        raise GispError("the evaluation data has no predicted token: give longer sequences")
    mean = total / tokens
    if math.isnan(mean):
        raise GispError("the loss on the evaluation data is NaN: check the weights, or use --dtype float32")
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, tokens, window)
