"""Cached tokenisation: equal to fresh, found again only where it must be, never in the way."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from word_tokenizer import CHAT_TEMPLATE, WORDS, save_tokenizer

from gisp.data import Sequences, load_sequences
from gisp.data.cache import cache_folder
from gisp.data.encode import PairEncoder

ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "the cat sat on the mat"}, {"text": "a dog ran"}],
    "completion": [{"prompt": "the cat", "completion": " sat"}, {"prompt": "a", "completion": " dog ran"}],
    "choices": [{"context": "the cat", "choices": [" ran", " sat on", " mat"], "answer": i} for i in (0, 2)],
    "messages": [{"messages": [{"role": r, "content": "a cat"} for r in ("user", "assistant")]}] * 2,
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GISP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def load(tmp_path):
    def load(kind: str = "text", **options) -> Sequences:
        path = tmp_path / f"{kind}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
        if not (tmp_path / "model").exists():
            save_tokenizer(tmp_path / "model", chat_template=CHAT_TEMPLATE)
        given = {"vocab_size": 12, "seq_len": 4, "tokenizer_from": str(tmp_path / "model"), **options}
        return load_sequences(path, **given)

    return load


def assert_equal(found: Sequences, expected: Sequences) -> None:
    assert (found.signs, found.examples, found.tasks) == (expected.signs, expected.examples, expected.tasks)
    for one, other in zip(found.rows, expected.rows, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype == torch.int64 and torch.equal(a, b)


def forbid_tokenising(monkeypatch) -> None:
    def refuse(encoder, text, special):
        raise AssertionError(f"tokenised again: {text!r}")

    monkeypatch.setattr(PairEncoder, "_encode", refuse)


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("text", "lm"),
        ("completion", "completion"),
        ("choices", "margin"),
        ("messages", "lm"),
        ("messages", "completion"),
    ],
)
def test_cached_equals_fresh(kind, objective, cache, load, monkeypatch):
    monkeypatch.setenv("GISP_CACHE", "off")
    fresh = load(kind, objective=objective)
    assert not cache.exists()
    monkeypatch.setenv("GISP_CACHE", str(cache.parent))
    assert_equal(load(kind, objective=objective), fresh)
    assert len(list(cache.iterdir())) == 1
    forbid_tokenising(monkeypatch)
    assert_equal(load(kind, objective=objective), fresh)


def test_whatever_changes_the_tokens_changes_the_entry(cache, load, tmp_path):
    load()
    entries = {path.name for path in cache.iterdir()}

    def changed(**options) -> bool:
        load(**options)
        before = len(entries)
        entries.update(path.name for path in cache.iterdir())
        return len(entries) > before

    assert not changed()
    assert not changed(vocab_size=50)
    assert changed(seq_len=5)
    save_tokenizer(tmp_path / "model", (*WORDS[:2], "dog", *WORDS[3:7], "cat", *WORDS[8:]), CHAT_TEMPLATE)
    assert changed()
    save_tokenizer(tmp_path / "model", chat_template=CHAT_TEMPLATE.replace("stop", "mat"))
    assert changed()
    (tmp_path / "text.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"text": "a dog sat"}\n')
    assert changed()
    # What a row holds beside its text is not tokenised.
    (tmp_path / "text.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"text": "a dog sat", "id": 3}\n')
    assert not changed()
    load("choices", objective="lm")
    entries.update(path.name for path in cache.iterdir())
    assert changed(kind="choices", objective="margin")


def test_a_cached_token_is_checked_against_the_vocabulary_of_each_model(cache, load):
    load()
    with pytest.raises(ValueError, match="the model's vocabulary is 4"):
        load(vocab_size=4)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 2], flipped, lambda data: b"{}" * 50]
)
def test_a_damaged_entry_is_made_anew(damage, cache, load, monkeypatch):
    fresh = load("choices", objective="margin")
    [entry] = cache.iterdir()
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    assert_equal(load("choices", objective="margin"), fresh)
    assert entry.read_bytes() == sound
    forbid_tokenising(monkeypatch)
    assert_equal(load("choices", objective="margin"), fresh)


def test_a_place_that_cannot_be_written_is_no_error(tmp_path, load, monkeypatch):
    (tmp_path / "taken").write_text("a file where the folder would be")
    monkeypatch.setenv("GISP_CACHE", str(tmp_path / "taken"))
    assert len(load()) > 0
    assert (tmp_path / "taken").read_text() == "a file where the folder would be"


def test_an_interrupted_write_leaves_no_entry(cache, load, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(load()) > 0
    assert list(cache.iterdir()) == []


def test_where_entries_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GISP_CACHE")
    assert cache_folder() == tmp_path / ".cache" / "gisp" / "tokens"
    monkeypatch.setenv("GISP_CACHE", "OFF")
    assert cache_folder() is None
