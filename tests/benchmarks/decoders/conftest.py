"""A tiny corpus of the shipped text, and a tiny shape."""

from __future__ import annotations

import json

import pytest

from benchmarks.decoders.corpus import Corpus, SourceFile
from benchmarks.decoders.llama import TrainConfig
from gisp.demo import demo_files


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig(vocab_size=300, layers=2, hidden=32, heads=2, mlp=48, seq_len=32, batch=8)


@pytest.fixture(scope="module")
def tiny_corpus() -> Corpus:
    shipped = demo_files()
    lines = [
        line
        for path, count in ((shipped.calibration, 12), (shipped.heldout, 2))
        for line in path.read_text("utf-8").splitlines()[:count]
    ]
    files = (SourceFile(row["path"], row["text"][:3000]) for row in map(json.loads, lines))
    return Corpus(tuple(sorted(files, key=lambda f: f.path)), "3.11")
