"""The tokenizer and its token streams."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decoders.corpus import Corpus
from benchmarks.decoders.tokens import END_OF_TEXT, encode, train_tokenizer, windows


def test_tokenizer_round_trip(tiny_corpus: Corpus) -> None:
    texts = [file.text for file in tiny_corpus.files]
    tokenizer = train_tokenizer(texts, 400)
    assert len(tokenizer) == 400
    for text in [*texts, "  \t\n\n    naïve 漢字 \U0001f600 \x00 end  "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    again = train_tokenizer(texts, 400)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_tokenizer_needs_room_for_bytes() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        train_tokenizer(["x"], 256)


def test_stream_has_an_end_after_each_text() -> None:
    tokenizer = train_tokenizer(["a b c"], 300)
    stream = encode(tokenizer, ["ab", "c"])
    assert tokenizer.decode(stream) == f"ab{END_OF_TEXT}c{END_OF_TEXT}"
    assert stream.dtype == torch.int64


def test_windows() -> None:
    assert windows(torch.arange(10), 3, 2).tolist() == [[2, 3, 4], [5, 6, 7]]
    with pytest.raises(ValueError, match="fewer than a sequence of 11"):
        windows(torch.arange(10), 11)
