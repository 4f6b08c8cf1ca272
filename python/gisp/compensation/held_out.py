"""Calibration text in an order that has a bit of every task first, and a part of it held out."""

from __future__ import annotations

from gisp.data import Sequences
from gisp.errors import GispError

# So many tokens are held out, or about this part of the data.
_TOKENS, _PART = 32768, 5


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
    """Sequences to fit to, and those held out, spread evenly over the data.

    The answers of one question, which share their text, stay on one side. About 32,768 tokens are held out, or a fifth
    of fewer than five times as many; the shortest sequence where all are too long.

    Raises:
        GispError: a single sequence, or a single question.
    """
    questions = min(data.signs, default=1) < 0
    units = data.examples if questions else tuple((row,) for row in range(len(data.rows)))
    if len(units) < 2:
        raise GispError(
            f"--compensate kfac needs at least 2 calibration sequences, one is held out for the step size; here is "
            f"{len(units)} {'question' if questions else 'sequence'}: give more text or shorter rows"
        )
    data = Sequences(data.rows, data.signs, units)
    sizes = [sum(len(data.rows[row][0]) for row in unit) for unit in units]
    total = sum(sizes)
    wanted = min(_TOKENS, total // _PART)
    passed = held = 0
    chosen = []
    for number, size in enumerate(sizes):
        passed += size
        # Held out is the part of the tokens so far that is wanted of all, to half a sequence.
        if (2 * held + size) * total <= 2 * wanted * passed:
            chosen.append(number)
            held += size
    chosen = chosen or [min(range(len(sizes)), key=sizes.__getitem__)]
    out = set(chosen)
    return data.chosen([number for number in range(len(sizes)) if number not in out]), data.chosen(chosen)
