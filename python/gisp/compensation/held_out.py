"""Calibration text in an order that has a bit of every task first, and a part of it held out."""

from __future__ import annotations

from gisp.data import Sequences
from gisp.errors import GispError

# So many tokens are held out, or about this part of the data.
_TOKENS, _PART = 32768, 5
# So many units are held out, or half of fewer than twice as many; fewer than these are too few for both sides.
_LEAST = 4


def interleaved(data: Sequences) -> Sequences:
    """Examples of a mixture's tasks in turn, so that the first tokens hold every task in its share; others as they are.

    What comes out is one task: its loss has no shares, compensation has no use for them.
    """
    if not data.tasks:
        return data
    places = [
        ((number + 0.5) / task.examples, k) for k, task in enumerate(data.tasks) for number in range(task.examples)
    ]
    return data.chosen(sorted(range(len(places)), key=places.__getitem__))


def hold_out(data: Sequences) -> tuple[Sequences, Sequences]:
    """Sequences to fit to, and those held out, spread evenly over the data, in units that stay on one side.

    A unit is a document where there are at least 8: pieces of one document are alike, and would make held-out text look
    like text that was fitted to. It is a question with its answers, and otherwise a single sequence. About 32,768
    tokens are held out, or a fifth of fewer than five times as many. At least 4 units are, or half of fewer than 8: a
    difference over fewer has no standard error worth the name.

    Returns:
        Both with their units as examples.

    Raises:
        GispError: fewer than 4 units.
    """
    questions = min(data.signs, default=1) < 0
    whole = questions or len(data.examples) >= 2 * _LEAST
    units = data.examples if whole else tuple((row,) for row in range(len(data.rows)))
    if len(units) < _LEAST:
        what = "question" if questions else "sequence"
        raise GispError(
            f"a compensation needs at least {_LEAST} calibration {what}s, half of them are held out to hold it "
            f"against; here is {len(units)} {what}{'s' * (len(units) > 1)}: give more text or shorter rows"
        )
    data = Sequences(data.rows, data.signs, units)
    sizes = [sum(len(data.rows[row][0]) for row in unit) for unit in units]
    total = sum(sizes)
    wanted = min(_TOKENS, total // _PART)
    passed = held = 0
    chosen = []
    for number, size in enumerate(sizes):
        passed += size
        # Held out is the part of the tokens so far that is wanted of all, to half a unit.
        if (2 * held + size) * total <= 2 * wanted * passed:
            chosen.append(number)
            held += size
    least = min(_LEAST, len(units) // 2)
    if len(chosen) < least:
        chosen = [(2 * number + 1) * len(units) // (2 * least) for number in range(least)]
    out = set(chosen)
    return data.chosen([number for number in range(len(sizes)) if number not in out]), data.chosen(chosen)
