"""Choice tasks made of plain text: calibration examples, the right ones alone, and evaluation questions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gisp.data import Sequences
from gisp.evaluation.choices import Choice
from gisp.evaluation.pairs import Request
from gisp.objectives import IGNORED

# Which of four tokens comes next; which of four continuations; which token fits in a continuation.
TASKS = ("cloze", "continuation", "replacement")
CHOICES = 4
CLOZE_CONTEXT = 15
CONTEXT, CONTINUATION = 48, 12

Pieces = tuple[torch.Tensor, list[torch.Tensor]]
"""Context, and what may follow it, the right one first."""


class ChoiceTask:
    """One task.

    Args:
        name: one of ``TASKS``.
        text: text whose pairs of tokens say what usually follows (``cloze``): the calibration text.
    """

    def __init__(self, name: str, text: Sequences) -> None:
        self.name = name
        self._followers = followers(text) if name == "cloze" else {}

    def pieces(self, data: Sequences) -> Iterator[Pieces]:
        """What the rows of the data give, in their order; some give nothing."""
        for ids, _ in data.rows:
            if self.name == "cloze":
                yield from _clozes(ids, self._followers)
            else:
                made = _continuations(ids) if self.name == "continuation" else _replacements(ids)
                if made:
                    yield ids[:CONTEXT], made

    def examples(self, data: Sequences) -> Sequences:
        """Calibration examples: the right choice with sign +1, the others -1."""
        rows, signs, examples = [], [], []
        for context, pieces in self.pieces(data):
            numbers = []
            for i, piece in enumerate(pieces):
                ids = torch.cat((context, piece))
                labels = ids.clone()
                labels[: len(context)] = IGNORED
                numbers.append(len(rows))
                rows.append((ids, labels))
                signs.append(-1 if i else 1)
            examples.append(tuple(numbers))
        return Sequences(tuple(rows), tuple(signs), tuple(examples))

    def right_ones(self, data: Sequences) -> Sequences:
        """The right choices alone."""
        every = self.examples(data)
        return Sequences.plain([row for row, sign in zip(every.rows, every.signs, strict=True) if sign > 0])

    def questions(self, data: Sequences) -> list[Choice]:
        """Evaluation questions; the place of the right choice does not matter, its score does."""
        found = []
        for context, pieces in self.pieces(data):
            requests = [
                Request(tuple(torch.cat((context, piece))[:-1].tolist()), tuple(piece.tolist()), False)
                for piece in pieces
            ]
            found.append(Choice(tuple(requests), tuple("x" for _ in pieces), 0))
        return found


def followers(text: Sequences) -> dict[int, list[int]]:
    """By token the tokens seen behind it, the most frequent first, then the smallest."""
    base = 1 + max((int(ids.max()) for ids, _ in text.rows), default=0)
    pairs = torch.cat([ids[:-1].long() * base + ids[1:].long() for ids, _ in text.rows])
    found, counts = pairs.unique(return_counts=True)
    behind: dict[int, list[int]] = {}
    for pair in found[counts.argsort(descending=True, stable=True)].tolist():
        behind.setdefault(pair // base, []).append(pair % base)
    return behind


def _clozes(ids: torch.Tensor, behind: dict[int, list[int]]) -> Iterator[Pieces]:
    """Per window of a row its last token, against the three tokens that most often follow the one before it.

    Pairs of tokens give the answer away backwards: on the two reference decoders' text the one that follows least often
    is right in 68 % of the questions.
    """
    for window in ids.split(CLOZE_CONTEXT + 1):
        if len(window) <= CLOZE_CONTEXT:
            return
        context, right = window[:CLOZE_CONTEXT], int(window[-1])
        wrong = [token for token in behind.get(int(context[-1]), []) if token != right][: CHOICES - 1]
        if len(wrong) == CHOICES - 1:
            yield context, [torch.tensor([token], dtype=ids.dtype) for token in (right, *wrong)]


def _continuations(ids: torch.Tensor) -> list[torch.Tensor]:
    """The continuation and those later in the row."""
    need = CONTEXT + CHOICES * CONTINUATION
    return list(ids[CONTEXT:need].split(CONTINUATION)) if len(ids) >= need else []


def _replacements(ids: torch.Tensor) -> list[torch.Tensor]:
    """The continuation, and the same with one token replaced, as in WinoGrande: which of the context's tokens fits.

    Replaced is the token that the context has but has least often, neither the first nor the last; in its place stand
    the latest tokens that the context has at most twice.
    """
    context, right = ids[:CONTEXT].tolist(), ids[CONTEXT : CONTEXT + CONTINUATION]
    places = [i for i, token in enumerate(right.tolist()[1:-1], 1) if token in context]
    if len(right) < CONTINUATION or not places:
        return []
    place = min(places, key=lambda i: context.count(int(right[i])))
    others = [t for t in dict.fromkeys(reversed(context)) if t != int(right[place]) and context.count(t) <= 2]
    if len(others) < CHOICES - 1:
        return []
    wrong = right.repeat(CHOICES - 1, 1)
    wrong[:, place] = torch.tensor(others[: CHOICES - 1])
    return [right, *wrong]
