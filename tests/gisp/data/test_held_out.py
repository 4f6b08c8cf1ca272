"""What compensation fits to and what it holds out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_tokens

from gisp.data import Sequences, Task
from gisp.data.held_out import hold_out, interleaved, stored_run_text, without
from gisp.data.token_files import stored_sequences
from gisp.errors import GispError


def rows(lengths: tuple[int, ...], offset: int = 0) -> Sequences:
    """Row i holds tokens ``offset + i``."""
    made = [torch.full((n,), offset + i) for i, n in enumerate(lengths)]
    return Sequences.plain([(ids, ids) for ids in made])


def numbers(data: Sequences) -> list[int]:
    return [int(ids[0]) for ids, _ in data.rows]


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ((4,) * 20, [2, 7, 12, 17]),
        ((4,) * 4, [1, 3]),
        ((1000, 10, 1000, 10, 10), [1, 3, 4]),
        ((16,) * 3 + (4,) * 3, [1, 3, 5]),
        ((16,) * 12, [1, 4, 7, 10]),
        ((256,) * 2000, [7 + round(15.625 * i) for i in range(128)]),
    ],
)
def test_rows_spread_over_the_data_are_held_out(lengths: tuple[int, ...], wanted: list[int]) -> None:
    data = rows(lengths)
    seen, held_out = hold_out(data)
    found = numbers(held_out)
    assert len(found) == len(wanted) and all(abs(a - b) <= 1 for a, b in zip(found, wanted, strict=True))
    assert sorted(numbers(seen) + found) == list(range(len(lengths))) and numbers(seen) == sorted(numbers(seen))


def test_the_rows_of_an_example_stay_together() -> None:
    ids = tiny_tokens(24, 8)
    data = Sequences(
        tuple((row, row) for row in ids), (1, -1, -1, -1) * 6, tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(6))
    )
    seen, held_out = hold_out(data)
    assert (len(seen.examples), len(held_out.examples)) == (3, 3)
    assert all(torch.equal(a[0], b) for a, b in zip(held_out.rows[4:8], ids[12:16], strict=True))


@pytest.mark.parametrize("number", [1, 3])
def test_few_examples_cannot_be_split(number: int) -> None:
    with pytest.raises(GispError, match=rf"at least 4 calibration sequences, .* here is {number} sequence"):
        hold_out(rows((16,) * number))
    one = Sequences(rows((8, 8)).rows, (1, -1), ((0, 1),))
    with pytest.raises(GispError, match=r"at least 4 calibration questions, .* here is 1 question:"):
        hold_out(one)


def test_the_pieces_of_a_long_text_are_split() -> None:
    pieces = Sequences(rows((8,) * 10).rows, (1,) * 10, (tuple(range(10)),))
    seen, held_out = hold_out(pieces)
    assert (numbers(held_out), len(seen.rows)) == ([1, 3, 6, 8], 6)


def test_the_pieces_of_one_document_stay_together() -> None:
    documents = Sequences(rows((8,) * 20).rows, (1,) * 20, tuple((2 * i, 2 * i + 1) for i in range(10)))
    seen, held_out = hold_out(documents)
    assert numbers(held_out) == [2, 3, 6, 7, 12, 13, 16, 17]
    assert (len(seen.examples), len(held_out.examples)) == (6, 4)


def test_tasks_of_a_mixture_are_taken_in_turn() -> None:
    few, many = rows((4,) * 2), rows((4,) * 8, offset=100)
    mixed = Sequences.mixture([(Task("few", "lm", 0.5, 2), few), (Task("many", "lm", 0.5, 8), many)])
    found = interleaved(mixed)
    assert numbers(found) == [100, 101, 0, 102, 103, 104, 105, 1, 106, 107]
    assert not found.tasks and interleaved(few) is few


def kinds(data: Sequences) -> list[str]:
    return [kind.removesuffix(".jsonl") for kind in data.kinds]


def mixed(**counts: int) -> Sequences:
    return Sequences.mixture(
        [
            (Task(f"texts/{name}.jsonl", "lm", 1 / len(counts), count), rows((4,) * count, offset=100 * number))
            for number, (name, count) in enumerate(counts.items())
        ]
    )


def test_every_kind_gives_its_part() -> None:
    data = mixed(wiki=80, books=9, code=3, mail=2)
    seen, held_out = hold_out(interleaved(data))
    found = {name: kinds(held_out).count(name) for name in ("wiki", "books", "code", "mail")}
    assert found["wiki"] == 16 and found["books"] == 4 and found["code"] + found["mail"] == 2
    by_number = {number: name for name, number in zip(kinds(data), numbers(data), strict=True)}
    for part in (seen, held_out):
        assert [by_number[number] for number in numbers(part)] == kinds(part)
    assert sorted(numbers(seen) + numbers(held_out)) == sorted(numbers(data))


def test_kinds_without_end_hold_out_no_more_text() -> None:
    data = mixed(**{f"kind{i}": 8 for i in range(60)})
    _, held_out = hold_out(interleaved(data))
    assert len(held_out.rows) <= 16 * 4 + 44 * 8 // 5


def test_files_of_one_name_are_two_kinds() -> None:
    tasks = [(Task(name, "lm", 0.5, 2), rows((4, 4))) for name in ("a/x.jsonl", "b/x.jsonl", "lm-eval:piqa@b/x")]
    assert Sequences.mixture(tasks).kinds[::2] == ("a/x.jsonl", "b/x.jsonl", "lm-eval:piqa@b/x")


def test_kinds_change_no_digest() -> None:
    data = mixed(wiki=4, books=4)
    assert replace(data, kinds=()).digest() == data.digest()


def test_text_of_a_run_that_is_in_the_data_is_left_out() -> None:
    text, other = rows((4,) * 6), rows((4,) * 2, offset=4)
    found = without(text, other)
    assert found is not None and numbers(found) == [0, 1, 2, 3]
    assert without(text, rows((4,) * 5)) is None and without(None, other) is None


def test_text_of_a_run_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "held-out.safetensors"
    text = hold_out(interleaved(mixed(wiki=20, books=20)))[1]
    path.write_bytes(stored_sequences(text))
    found = stored_run_text(path)
    assert found is not None and (found.kinds, found.examples, found.signs) == (text.kinds, text.examples, text.signs)
    assert all(
        torch.equal(a, b) for one, two in zip(found.rows, text.rows, strict=True) for a, b in zip(one, two, strict=True)
    )
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert {name: tensor.dtype for name, tensor in tensors.items() if name != "names"} == dict.fromkeys(
        ("ids", "labels", "lengths", "signs", "examples", "kinds"), torch.int32
    )
    save_file({**tensors, "kinds": 1 - tensors["kinds"]}, path, metadata)
    with pytest.raises(GispError, match=r"held-out\.safetensors is corrupt: restore it, or remove it"):
        stored_run_text(path)
    assert stored_run_text(tmp_path / "none") is None
