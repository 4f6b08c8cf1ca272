"""Accuracy on multiple-choice rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gisp.data.rows import check_messages
from gisp.errors import GispError, quoted
from gisp.evaluate.pairs import Request, RequestEncoder, likelihood_bytes, log_likelihoods
from gisp.evaluate.perplexity import from_total

FORMAT = "context or messages, choices and answer, or contexts, continuation and answer"


@dataclass(frozen=True)
class Question:
    """One question with its choices.

    Attributes:
        requests: one per choice.
        texts: what tells the choices apart, without the delimiter before it.
        answer: number of the right choice.
    """

    requests: tuple[Request, ...]
    texts: tuple[str, ...]
    answer: int


class ChoiceAccuracy:
    """Accuracy of the choice with the highest log-probability.

    ``acc`` compares summed log-probabilities; ``acc_norm`` divides them by the characters of the choice text and
    ``acc_bytes`` by its UTF-8 bytes, as lm-eval 0.4.13 does under these names. Of equal choices the first counts.
    The perplexity is that of the right answers' tokens.
    """

    def __init__(self, questions: Sequence[Question], window: int, batch_size: int | None = None) -> None:
        self._questions = questions
        self._window = window
        self._batch_size = batch_size
        self._requests = [request for question in questions for request in question.requests]

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        values = iter(log_likelihoods(model, self._requests, self._batch_size))
        hits: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
        total, tokens = 0.0, 0
        for question in self._questions:
            sums = np.array([next(values) for _ in question.requests])
            characters = np.array([len(text) for text in question.texts])
            of_bytes = np.array([len(text.encode()) for text in question.texts])
            for name, lengths in (("acc", 1), ("acc_norm", characters), ("acc_bytes", of_bytes)):
                hits[name].append(bool(np.argmax(sums / lengths) == question.answer))
            total -= sums[question.answer]
            tokens += len(question.requests[question.answer].targets)
        gold = from_total(total, tokens, self._window)
        result: dict[str, Any] = {}
        for name, found in hits.items():
            result |= mean_with_error(name, found)
        return {
            **result,
            "examples": len(self._questions),
            "truncated": sum(any(r.truncated for r in question.requests) for question in self._questions),
            **asdict(gold),
        }

    def working(self, model: nn.Module, device: torch.device) -> int:
        """As of :class:`gisp.evaluate.data.Measure`."""
        return likelihood_bytes(model, self._requests, device, self._batch_size)


def mean_with_error(name: str, hits: Sequence[bool]) -> dict[str, float | None]:
    """Mean of 0 and 1 and its standard error, sample standard deviation / sqrt(n); ``None`` for a single one."""
    count, mean = len(hits), sum(hits) / len(hits)
    error = math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None
    return {name: mean, f"{name}_stderr": error}


def read_question(row: dict[str, Any], encoder: RequestEncoder, where: str) -> Question:
    """A row of ``context``, ``choices`` and ``answer``, or of ``contexts`` that share a ``continuation``.

    ``messages`` in place of ``context`` are a conversation that the choices answer, through the chat template.

    ``contexts`` may also stand beside ``choices``, which are then their continuations one by one; the texts that are
    compared are the contexts either way, as in lm-eval. A ``delimiter`` names what every choice begins with and what
    is not counted as a part of its text (lm-eval's ``target_delimiter``).

    Raises:
        GispError: a row of another form, fewer than two choices, an answer out of range.
    """
    if row.get("contexts") is not None:
        texts = _texts(row, "contexts", where)
        if row.get("continuation") is not None or row.get("choices") is None:
            _text(row, "continuation", where)
        elif len(_texts(row, "choices", where)) != len(texts):
            raise GispError(
                f"{where} has {len(texts)} contexts and {len(row['choices'])} choices: give as many of both"
            )
    else:
        delimiter = str(row.get("delimiter") or "")
        texts = tuple(text.removeprefix(delimiter) or text for text in _texts(row, "choices", where))
        if row.get("messages") is not None and row.get("context") is None:
            check_messages(row["messages"], where)
        else:
            _text(row, "context", where)
    answer = row.get("answer")
    if type(answer) is not int or not 0 <= answer < len(texts):
        raise GispError(f"{where} has answer {quoted(answer)}: give the index of one of {len(texts)} choices")
    return Question(tuple(encoder.request(*pair, where) for pair in encoder.choices(row, where)), texts, answer)


def _texts(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = row.get(key)
    if not isinstance(values, (list, tuple)) or len(values) < 2:
        raise GispError(f"{where} has {key} {quoted(values)}: give a list of at least two texts")
    if any(isinstance(value, (list, dict)) or value is None or value == "" for value in values):
        raise GispError(f"{where} has {key} {quoted(values)}: every one must be a text")
    return tuple(str(value) for value in values)


def _text(row: dict[str, Any], key: str, where: str) -> None:
    if not isinstance(row.get(key), str):
        keys = ", ".join(map(str, row))
        raise GispError(f"{where} has {key} {quoted(row.get(key))} and the keys {keys}: give {FORMAT}")
