"""Text of the demo in tokens of its decoder, encoded once a process."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gisp
from gisp.data import Sequences, load_sequences

DEMO = Path(gisp.__file__).parent / "demo"


@cache
def _loaded(name: str) -> Sequences:
    return load_sequences(str(DEMO / name), vocab_size=2048, seq_len=128, tokenizer_from=str(DEMO / "decoder"))


def pages(name: str, documents: range) -> Sequences:
    """Beginnings of documents, up to 128 tokens of each."""
    found = _loaded(name)
    return Sequences.plain([found.rows[found.examples[number][0]] for number in documents])
