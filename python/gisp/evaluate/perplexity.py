"""Perplexity of a model on token sequences, with a stated window and stride."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from gisp.config.evaluation import check_stride
from gisp.data import Sequences
from gisp.data.sequences import IGNORED
from gisp.errors import GispError
from gisp.evaluate.batches import each_batch, length_batches, vocabulary
from gisp.evaluate.memory import batch_tokens, losses_bytes, scoring_bytes
from gisp.evaluate.staged_loss import StagedLoss
from gisp.model.modes import evaluation_mode
from gisp.replicas.sharing import agree_on
from gisp.score.objectives import sequence_nll


@dataclass(frozen=True)
class Perplexity:
    """exp(mean NLL) over ``tokens`` predicted tokens, in windows of at most ``window`` tokens."""

    perplexity: float
    tokens: int
    window: int


def perplexity(
    model: nn.Module,
    data: Sequences,
    window: int = 128,
    stride: int | None = None,
    *,
    batch_size: int | None = None,
    parts: StagedLoss | None = None,
) -> Perplexity:
    """Perplexity over all predicted tokens of all rows; rows longer than ``window`` are read in windows.

    Args:
        stride: tokens from one window's start to the next. ``None`` = ``window``: every window starts afresh and its
            first token is context only. Less than ``window``: every token of a row but its first is predicted once,
            from at least ``window - stride`` tokens where the row has them.
        batch_size: windows per forward pass, fewer where their logits are too many; ``None`` = by their tokens.
        parts: passes of a model whose layers lie in several processes, each of which gets the result.

    Raises:
        GispError: ``window`` below 2, ``stride`` outside [1, ``window``], nothing to predict, a NaN loss, or a mixture,
            whose tasks are to be measured one by one.
    """
    if data.tasks:
        raise GispError(f"a mixture of {len(data.tasks)} tasks has no perplexity: give the data of one of them")
    stride = check_stride(window, stride)
    agree_on("evaluation data", data.digest, parts.processes if parts else None)
    nll_of = parts or partial(sequence_nll, model)
    device = next(p.device for p in model.parameters() if not p.is_meta)
    pieces = _pieces(data, window, stride)
    lengths = [end - begin for _, begin, _, end in pieces]

    def measured(numbers: list[int]) -> tuple[float, int]:
        ids = [data.rows[row][0][begin:end] for row, begin, _, end in (pieces[i] for i in numbers)]
        labels = [_scored_labels(data.rows[pieces[i][0]][1], *pieces[i][1:]) for i in numbers]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(device)
        counts = (targets[:, 1:] != IGNORED).sum(1)
        return float((nll_of(padded, targets).double() * counts).sum()), int(counts.sum())

    with evaluation_mode(model), torch.no_grad():
        found = each_batch("evaluating", length_batches(lengths, device, batch_size, vocabulary(model)), measured)
    if parts is not None:
        found = parts.of_last(found)
    total, tokens = 0.0, 0
    for nll, count in found:
        total += nll
        tokens += count
    return from_total(total, tokens, window)


def from_total(total: float, tokens: int, window: int) -> Perplexity:
    """Perplexity from the summed NLL in nats.

    Raises:
        GispError: no token, or NaN.
    """
    if tokens == 0:
        raise GispError("the evaluation data has no predicted token: give longer sequences")
    mean = total / tokens
    if math.isnan(mean):
        raise GispError("the loss on the evaluation data is NaN: check the weights, or use --dtype float32")
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, tokens, window)


def perplexity_bytes(
    model: nn.Module, data: Sequences, window: int, stride: int, device: torch.device, batch_size: int | None = None
) -> int:
    """Memory that :func:`perplexity` of such a model takes of a device beside the weights, at most."""
    lengths = [end - begin for _, begin, _, end in _pieces(data, window, stride)]
    batches = length_batches(lengths, device, batch_size, vocabulary(model))
    tokens = max((batch_tokens([lengths[i] for i in batch]) for batch in batches), default=0)
    return scoring_bytes(model, tokens, losses_bytes(model, tokens))


def _pieces(data: Sequences, window: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Row, begin, first token to score and end of every window that predicts something."""
    return [
        (row, *piece)
        for row, (ids, labels) in enumerate(data.rows)
        for piece in windows(len(ids), window, stride)
        if _predicts(labels, *piece)
    ]


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Begin, first token to score and end of the windows over a row of ``length`` tokens."""
    scored = 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        yield begin, scored, end
        scored = end
        if end == length:
            return


def _predicts(labels: torch.Tensor, begin: int, scored: int, end: int) -> bool:
    """Whether a window has a scored token behind its first one."""
    return bool((labels[max(scored, begin + 1) : end] != IGNORED).any())


def _scored_labels(labels: torch.Tensor, begin: int, scored: int, end: int) -> torch.Tensor:
    piece = labels[begin:end].clone()
    piece[: scored - begin] = IGNORED
    return piece
