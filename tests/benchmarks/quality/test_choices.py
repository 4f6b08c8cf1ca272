"""Choice tasks made of plain text, and the rows a seed draws."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.quality.choices import CONTEXT, CONTINUATION, ChoiceTask
from benchmarks.quality.runner import drawn, read_tokens


def test_tasks_and_seeds_draw_what_they_say(files: Path) -> None:
    data = read_tokens(files / "calibration.safetensors", 96)
    few = drawn(data, 3 * 104, seed=1)
    assert len(few) == 3 and few.digest() != drawn(data, 3 * 104, seed=2).digest()
    choices = ChoiceTask("continuation", data).examples(data)
    assert len(choices.examples) == 12 and set(choices.signs) == {1, -1}
    row = data.rows[0][0]
    assert choices.rows[0][0].tolist() == row[: CONTEXT + CONTINUATION].tolist()
    assert [choices.signs[i] for i in choices.examples[0]] == [1, -1, -1, -1]
    question = ChoiceTask("continuation", data).questions(data)[0]
    assert question.requests[0].targets == tuple(row[CONTEXT:][:CONTINUATION].tolist())


def test_replacements_differ_in_one_token_of_the_context(files: Path) -> None:
    data = read_tokens(files / "calibration.safetensors", 96)
    choices = ChoiceTask("replacement", data).examples(data)
    assert 0 < len(choices.examples) <= 12
    rows = {tuple(ids[:CONTEXT].tolist()): ids for ids, _ in data.rows}
    for right, *wrong in choices.examples:
        ids, labels = choices.rows[right]
        context = ids[:CONTEXT].tolist()
        assert torch.equal(ids, rows[tuple(context)][: len(ids)])
        assert (labels[:CONTEXT] == -100).all() and torch.equal(labels[CONTEXT:], ids[48:])
        places = set()
        for other in wrong:
            (place,) = (choices.rows[other][0] != ids).nonzero().flatten().tolist()
            assert 48 < place < 59 and int(ids[place]) in context and int(choices.rows[other][0][place]) in context
            places.add((place, int(choices.rows[other][0][place])))
        assert len(places) == 3 and len({place for place, _ in places}) == 1
        assert [choices.signs[i] for i in (right, *wrong)] == [1, -1, -1, -1]


def test_the_answers_do_not_tell_which_one_is_right(files: Path) -> None:
    data = read_tokens(files / "calibration.safetensors", 96)
    every = [ids.tolist() for ids, _ in data.rows]
    pairs = Counter(pair for ids in every for pair in pairwise(ids))
    tokens = Counter(token for ids in every for token in ids)
    for name in ("follower", "label"):
        task = ChoiceTask(name, data)
        made = task.pieces(data)
        assert len(made) > 3
        answers: dict[int | None, set[int]] = {}
        for context, pieces in made:
            right, *wrong = (int(piece) for piece in pieces)
            assert any(ids[i : i + 16] == [*context.tolist(), right] for ids in every for i in range(len(ids) - 15))
            assert len({right, *wrong}) == 4
            known = int(context[-1]) if name == "follower" else None
            assert answers.setdefault(known, {right, *wrong}) == {right, *wrong}
        for known, four in answers.items():
            counts = tokens if known is None else Counter({b: n for (a, b), n in pairs.items() if a == known})
            assert min(counts[token] for token in four) >= max(
                (n for t, n in counts.items() if t not in four), default=0
            )
        if name == "label":
            assert len(set(Counter(int(pieces[0]) for _, pieces in made).values())) == 1
        examples, right_ones = task.examples(data), task.right_ones(data)
        assert [examples.signs[i] for i in examples.examples[0]] == [1, -1, -1, -1]
        assert all((labels[:15] == -100).all() and labels[15] == ids[15] for ids, labels in examples.rows)
        assert len(right_ones.rows) == len(examples.examples) == len(made) and set(right_ones.signs) == {1}


def test_what_pairs_of_tokens_tell(files: Path) -> None:
    data = read_tokens(files / "calibration.safetensors", 96)
    pairs = Counter(pair for ids, _ in data.rows for pair in pairwise(ids.tolist()))
    for name in ("follower", "label"):
        task, right = ChoiceTask(name, data), Fraction(0)
        for context, pieces in task.pieces(data):
            last, worth = int(context[-1]), {}
            for token in map(int, pieces):
                before = sum(n for (_, b), n in pairs.items() if b == token)
                worth[token] = pairs[last, token] / (before if name == "label" else 1)
            best = [token for token, value in worth.items() if value == max(worth.values())]
            right += Fraction(int(pieces[0]) in best, len(best))
        assert task.by_pairs(data) == pytest.approx(float(right / len(task.pieces(data))))
    assert ChoiceTask("continuation", data).by_pairs(data) is None
