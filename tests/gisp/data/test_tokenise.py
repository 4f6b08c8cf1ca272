"""Texts that are one document: tokenised whole, cut in windows, as papers read WikiText-2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from eval_cases import byte_tokenizer, write_rows

from gisp.data import load_sequences, read_rows

# As WikiText has them: headings and paragraphs with spaces around them, empty rows between.
PARAGRAPHS = ["", " = A cab = \n", "", " a cab and a bag \n", " it was big \n", ""]


class Stream:
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    def take(self, count: int) -> Stream:
        return Stream(self._rows[:count])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for ``datasets`` and what is asked of it."""
    calls: list[Any] = []

    def load_dataset(path: str, configuration: str, *, split: str, streaming: bool, trust_remote_code: bool) -> Stream:
        calls.append((path, configuration, split, streaming))
        return Stream([{"text": text} for text in PARAGRAPHS])

    stand_in = ModuleType("datasets")
    stand_in.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "datasets", stand_in)
    monkeypatch.setattr("gisp.data.sources.is_reachable", lambda: True)
    return calls


def tokens(spec: str | Path, folder: Path, seq_len: int = 8, *, start: bool = True, **options: Any) -> list[list[int]]:
    byte_tokenizer(start=start).save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    found = load_sequences(
        spec, vocab_size=96, seq_len=seq_len, tokenizer_from=str(folder / "model"), **options
    )  # fmt: skip
    assert all(ids.tolist() == labels.tolist() for ids, labels in found.rows)
    return [ids.tolist() for ids, _ in found.rows]


def windows(ids: list[int], size: int) -> list[list[int]]:
    return [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]


@pytest.mark.parametrize("start", [False, True])
def test_a_txt_is_one_document(start: bool, tmp_path: Path) -> None:
    text = "a cab\n\nand a bag, and so on\n"
    (tmp_path / "text.txt").write_text(text)
    whole = byte_tokenizer(start=start)(text)["input_ids"]
    assert (whole[0] == 0) == start and 0 not in whole[1:]
    assert tokens(tmp_path / "text.txt", tmp_path, start=start) == windows(whole, 8)
    assert tokens(tmp_path / "text.txt", tmp_path, 4096, start=start) == [whole]


def test_rows_of_a_jsonl_stay_documents_of_their_own(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "a cab"}, {"text": "a bag"}])
    plain = byte_tokenizer().encode
    assert tokens(data, tmp_path, 4096) == [[*plain("a cab"), 0, *plain("a bag"), 0]]
    # The same text in a .txt is read another way, and the cache knows it.
    one = write_rows(tmp_path / "one.jsonl", [{"text": "a cab"}])
    (tmp_path / "one.txt").write_text("a cab")
    assert tokens(one, tmp_path, 4096) == [[*plain("a cab"), 0]]
    assert tokens(tmp_path / "one.txt", tmp_path, 4096) == [[0, *plain("a cab")]]


@pytest.mark.parametrize(("held_out", "split"), [(False, "train"), (True, "test")])
def test_wikitext_is_one_document(held_out: bool, split: str, asked: list[Any], tmp_path: Path) -> None:
    whole = byte_tokenizer(start=True)("\n\n".join(PARAGRAPHS))["input_ids"]
    assert tokens("wikitext2", tmp_path, held_out=held_out) == windows(whole, 8)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", split, True)]


def test_other_datasets_are_rows(asked: list[Any]) -> None:
    assert list(read_rows("c4")) == [{"text": text} for text in PARAGRAPHS if text.strip()]
