"""Questions of several shapes, alone and among text."""

from __future__ import annotations

import torch
from tiny import VOCAB, tiny_tokens

from gisp.data import Sequences, Task
from gisp.data.sequences import IGNORED

SIGNS = (1, -1, -1, -1, 1, -1, 1, 1, -1)
EXAMPLES = ((0, 1, 2), (3, 4), (6, 5), (8, 7))


def answers() -> Sequences:
    """Questions of two and three answers of several lengths; the last one has its right answer last."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(9):
        ids = torch.randint(0, VOCAB, (5 + number,), generator=generator)
        labels = ids.clone()
        labels[: -1 - number % 3] = IGNORED
        rows.append((ids, labels))
    return Sequences(tuple(rows), SIGNS, EXAMPLES, compared=True)


def letters(contexts: tuple[int, ...] = (6, 4, 9, 5)) -> Sequences:
    """Questions answered by one token; of the second one answer stands behind another context, of the last it is long.

    The right answer is the first, the second, the third and the first one.
    """
    generator = torch.Generator().manual_seed(7)
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    signs: list[int] = []
    examples: list[tuple[int, ...]] = []
    for number, length in enumerate(contexts):
        context = torch.randint(0, VOCAB, (length,), generator=generator)
        first = len(rows)
        for answer in range(4):
            head = context.clone()
            if (number, answer) == (1, 2):
                head[0] = (head[0] + 1) % VOCAB
            tail = torch.tensor([11 + answer] * (2 if (number, answer) == (3, 1) else 1))
            labels = torch.cat((torch.full_like(head, IGNORED), tail))
            rows.append((torch.cat((head, tail)), labels))
            signs.append(1 if answer == number % 3 else -1)
        examples.append(tuple(range(first, first + 4)))
    return Sequences(tuple(rows), tuple(signs), tuple(examples), compared=True)


def mixed() -> Sequences:
    """Three rows of text, then the questions."""
    text = Sequences.plain([(ids, ids) for ids in tiny_tokens(3, 7)])
    return Sequences.mixture([(Task("text", "lm", 0.6, 3), text), (Task("questions", "choice", 0.4, 4), answers())])
