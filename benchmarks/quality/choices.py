"""Choice tasks made of plain text: calibration examples, the right ones alone, and evaluation questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch

from gisp.data import Sequences
from gisp.data.sequences import IGNORED
from gisp.evaluate.choices import Question
from gisp.evaluate.pairs import Request

# Which of the four tokens that most often follow the last one comes next; which of the four commonest tokens; which of
# four continuations; which token fits in a continuation.
TASKS = ("follower", "label", "continuation", "replacement")
CHOICES = 4
TOKEN_CONTEXT = 15
CONTEXT, CONTINUATION = 48, 12

Pieces = tuple[torch.Tensor, list[torch.Tensor]]
"""Context, and what may follow it, the right one first."""


class ChoiceTask:
    """One task.

    Args:
        name: one of ``TASKS``.
        text: the calibration text. Its tokens and pairs of tokens say which answers ``follower`` and ``label`` have;
            which of them is right has no part in that, or it could be told from the answers.
    """

    def __init__(self, name: str, text: Sequences) -> None:
        self.name = name
        self.pairs: Counter[tuple[int, int]] = Counter()
        if name in ("follower", "label"):
            self.pairs.update(pair for ids, _ in text.rows for pair in pairwise(ids.tolist()))
        self._followers = followers(self.pairs) if name == "follower" else {}
        self._labels = commonest(text) if name == "label" else []

    def pieces(self, data: Sequences) -> list[Pieces]:
        """What the rows of the data give, in their order; some give nothing."""
        if self.name == "follower":
            return [made for ids, _ in data.rows for made in _followed(ids, self._followers)]
        if self.name == "label":
            return _balanced([made for ids, _ in data.rows for made in _labelled(ids, self._labels)])
        cut = _continuations if self.name == "continuation" else _replacements
        return [(ids[:CONTEXT], made) for ids, _ in data.rows if (made := cut(ids))]

    def by_pairs(self, data: Sequences) -> float | None:
        """Accuracy of whoever knows nothing but how often pairs of tokens occur; ``None`` for answers of many tokens.

        Of ``label``, whose right answers are equally frequent, pairs count by the frequency of their second token. Of
        equally good answers one is drawn.
        """
        if not self.pairs:
            return None
        seen: Counter[int] = Counter()
        if self.name == "label":
            for (_, token), count in self.pairs.items():
                seen[token] += count
        right = []
        for context, pieces in self.pieces(data):
            last = int(context[-1])
            worth = [self.pairs[last, int(piece)] / (seen[int(piece)] or 1) for piece in pieces]
            right.append((worth[0] == max(worth)) / worth.count(worth[0]))
        return sum(right) / len(right) if right else None

    def examples(self, data: Sequences) -> Sequences:
        """Calibration examples: the right choice with sign +1, the others -1."""
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        signs: list[int] = []
        examples: list[tuple[int, ...]] = []
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

    def questions(self, data: Sequences) -> list[Question]:
        """Evaluation questions; the place of the right choice does not matter, its score does."""
        found = []
        for context, pieces in self.pieces(data):
            requests = [
                Request(tuple(torch.cat((context, piece))[:-1].tolist()), tuple(piece.tolist()), False)
                for piece in pieces
            ]
            found.append(Question(tuple(requests), tuple("x" for _ in pieces), 0))
        return found


def followers(pairs: Counter[tuple[int, int]]) -> dict[int, list[int]]:
    """By token the tokens seen behind it, the most frequent first, then the smallest."""
    behind: dict[int, list[int]] = {}
    for first, second in sorted(pairs, key=lambda pair: (-pairs[pair], pair)):
        behind.setdefault(first, []).append(second)
    return behind


def commonest(text: Sequences) -> list[int]:
    """The most frequent tokens, as many as there are choices."""
    return torch.cat([ids for ids, _ in text.rows]).bincount().argsort(descending=True, stable=True)[:CHOICES].tolist()


def _followed(ids: torch.Tensor, behind: dict[int, list[int]]) -> Iterator[Pieces]:
    """Per window of a row its last token, where it is one of the usual followers of the token before it."""
    for window in ids.split(TOKEN_CONTEXT + 1):
        usual = behind.get(int(window[-2]), [])[:CHOICES] if len(window) > TOKEN_CONTEXT else []
        if len(usual) == CHOICES and int(window[-1]) in usual:
            yield window[:-1], _tokens(int(window[-1]), usual)


def _labelled(ids: torch.Tensor, labels: list[int]) -> Iterator[Pieces]:
    """Labels of a row with the tokens before each; no token is in two of them."""
    place, values = TOKEN_CONTEXT, ids.tolist()
    while place < len(values):
        if values[place] in labels:
            yield ids[place - TOKEN_CONTEXT : place], _tokens(values[place], labels)
            place += TOKEN_CONTEXT
        place += 1


def _tokens(right: int, answers: list[int]) -> list[torch.Tensor]:
    return [torch.tensor([token]) for token in (right, *(token for token in answers if token != right))]


def _balanced(made: list[Pieces]) -> list[Pieces]:
    """As many of every right answer as of the rarest, the first ones."""
    counts = Counter(int(pieces[0]) for _, pieces in made)
    fewest = min(counts.values()) if len(counts) == CHOICES else 0
    taken: Counter[int] = Counter()
    kept = []
    for context, pieces in made:
        taken[int(pieces[0])] += 1
        if taken[int(pieces[0])] <= fewest:
            kept.append((context, pieces))
    return kept


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
