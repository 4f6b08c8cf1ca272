"""The decoder of a study: its token files come from their sides of the split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from benchmarks.decoders import corpus as corpora
from benchmarks.decoders.corpus import Corpus, SourceFile
from benchmarks.decoders.decoder import Decoder, described, train_decoder
from benchmarks.decoders.llama import TrainConfig
from benchmarks.decoders.tokens import encode, windows
from gisp.errors import GispError


def test_token_files_hold_each_side_of_the_split(tiny_corpus: Corpus, tmp_path: Path, config: TrainConfig) -> None:
    small = tmp_path / "corpus.jsonl.gz"
    corpora.save(tiny_corpus, small)
    out = tmp_path / "out"
    assert described(out) == {}
    train_decoder(out, small, None, replace(config, steps=2))
    decoder = Decoder.trained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(decoder.path)
    for path, texts in zip((decoder.calibration, decoder.evaluation), tiny_corpus.texts(), strict=True):
        found = load_file(path)["input_ids"]
        expected = windows(encode(tokenizer, texts), config.seq_len)
        assert found.dtype == torch.int32
        assert sorted(found.tolist()) == sorted(expected.tolist()) and found.tolist() != expected.tolist()
    assert described(out)["tokens"] == 2 * config.batch * config.seq_len
    assert described(out)["device"]


def test_too_little_text_is_refused(tmp_path: Path, config: TrainConfig) -> None:
    small = tmp_path / "corpus.jsonl.gz"
    corpora.save(Corpus((SourceFile("bz2.py", "x = 1\n" * 100),), "3.11"), small)
    with pytest.raises(GispError, match="1 training and 0 held-out"):
        train_decoder(tmp_path / "out", small, None, config)
    with pytest.raises(GispError, match="is not a corpus"):
        train_decoder(tmp_path / "out", tmp_path / "none", None, config)
