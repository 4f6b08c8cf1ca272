"""Calibration text in an order that has a bit of every task first, and a part of it held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gisp.data.sequences import Sequences
from gisp.data.token_files import read_sequences
from gisp.errors import GispError

# So many tokens are held out, or about this part of the data.
_TOKENS, _PART = 32768, 5
# So many texts are held out, or half of fewer than twice as many; fewer than these are too few for both sides.
LEAST = 4
# So many kinds of text, the largest, give their parts one by one; the rest gives one.
_KINDS = 16
_ATTRIBUTE = "gisp_run_text"


def interleaved(data: Sequences) -> Sequences:
    """Examples of a mixture's tasks in turn, so that the first tokens hold every task in its share; others as they are.

    What comes out is one task of several kinds: its loss has no shares, compensation has no use for them.
    """
    if not data.tasks:
        return data
    places = [
        ((number + 0.5) / task.examples, k) for k, task in enumerate(data.tasks) for number in range(task.examples)
    ]
    return data.chosen(sorted(range(len(places)), key=places.__getitem__))


def hold_out(data: Sequences) -> tuple[Sequences, Sequences]:
    """Sequences to fit to, and those held out, spread evenly over the data, in texts that stay on one side whole.

    A text is a document where there are at least 8: pieces of one document are alike, and would make held-out text look
    like text that was fitted to. It is a question with its answers, and otherwise a single sequence. About 32,768
    tokens are held out, or a fifth of fewer than five times as many. At least 4 texts are, or half of fewer than 8: a
    difference over fewer has no standard error worth the name. Every kind of text gives its part, and where it has 8
    texts at least 4 of them; there are 16 such kinds at most.

    Returns:
        Both with their texts as examples.

    Raises:
        GispError: fewer than 4 texts.
    """
    questions = min(data.signs, default=1) < 0
    whole = questions or len(data.examples) >= 2 * LEAST
    texts = data.examples if whole else tuple((row,) for row in range(len(data.rows)))
    if len(texts) < LEAST:
        what = "question" if questions else "sequence"
        raise GispError(
            f"a compensation needs at least {LEAST} calibration {what}s, half of them are held out to hold it "
            f"against; here is {len(texts)} {what}{'s' * (len(texts) > 1)}: give more text or shorter rows"
        )
    kinds = data.kinds
    if kinds and not whole:
        of_rows = {row: kind for example, kind in zip(data.examples, kinds, strict=True) for row in example}
        kinds = tuple(of_rows[row] for row in range(len(data.rows)))
    data = Sequences(data.rows, data.signs, texts, kinds=kinds)
    sizes = [sum(len(data.rows[row][0]) for row in example) for example in texts]
    total = sum(sizes)
    wanted = min(_TOKENS, total // _PART)
    chosen = sorted(
        own[place]
        for own in _by_kind(kinds, sizes)
        for place in _spread([sizes[number] for number in own], wanted, total)
    )
    out = set(chosen)
    return data.chosen([number for number in range(len(sizes)) if number not in out]), data.chosen(chosen)


def _by_kind(kinds: Sequence[str], sizes: Sequence[int]) -> list[list[int]]:
    """Numbers of the texts of every kind that is large enough, and of the rest."""
    if not kinds:
        return [list(range(len(sizes)))]
    tokens: Counter[str] = Counter()
    for kind, size in zip(kinds, sizes, strict=True):
        tokens[kind] += size
    counts = Counter(kinds)
    large = [kind for kind, _ in tokens.most_common() if counts[kind] >= 2 * LEAST][:_KINDS]
    found = [[number for number, own in enumerate(kinds) if own == kind] for kind in large]
    rest = [number for number, own in enumerate(kinds) if own not in large]
    return [*found, rest] if rest else found


def _spread(sizes: Sequence[int], wanted: int, total: int) -> list[int]:
    """Places of texts that are held out of some of these sizes, where ``wanted`` tokens are of ``total`` ones."""
    passed = held = 0
    chosen = []
    for number, size in enumerate(sizes):
        passed += size
        # Held out is the part of the tokens so far that is wanted of all, to half a text.
        if (2 * held + size) * total <= 2 * wanted * passed:
            chosen.append(number)
            held += size
    least = min(LEAST, len(sizes) // 2)
    if len(chosen) < least:
        chosen = [(2 * number + 1) * len(sizes) // (2 * least) for number in range(least)]
    return chosen


def held_out_of_run(data: Sequences) -> Sequences | None:
    """The part of a run's calibration text that compensations of it are held against; ``None`` of too little text."""
    try:
        return hold_out(interleaved(data))[1]
    except GispError:
        return None


def without(text: Sequences | None, data: Sequences) -> Sequences | None:
    """The examples of ``text`` with no row that is one of the data; ``None`` where these are fewer than two."""
    if text is None:
        return None
    known = {ids.numpy().tobytes() for ids, _ in data.rows}
    apart = [
        number
        for number, example in enumerate(text.examples)
        if not any(text.rows[row][0].numpy().tobytes() in known for row in example)
    ]
    return text.chosen(apart) if len(apart) > 1 else None


def remember_run_text(model: Any, text: Sequences | Path | None) -> None:
    """Let a model carry the held-out text of the run it belongs to, or the file that holds it."""
    setattr(model, _ATTRIBUTE, text)


def run_text_of(model: Any) -> Sequences | None:
    """The held-out text of the run that a model belongs to; ``None`` where there is no run, or one that kept none.

    Raises:
        GispError: the file is corrupt.
    """
    return stored_run_text(getattr(model, _ATTRIBUTE, None))


def stored_run_text(text: Sequences | Path | None) -> Sequences | None:
    """The held-out text of a run from its file, ``None`` where there is none.

    Raises:
        GispError: the file is corrupt.
    """
    if not isinstance(text, Path):
        return text
    if not text.is_file():
        return None
    found = read_sequences(text)
    if found is None:
        raise GispError(f"{text} is corrupt: restore it, or remove it to compensate without the run's own text")
    return found
