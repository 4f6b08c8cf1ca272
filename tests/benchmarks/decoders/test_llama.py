"""Course of the learning rate, loss and perplexity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from benchmarks.decoders.corpus import Corpus
from benchmarks.decoders.llama import TrainConfig, build_model, next_token_loss, perplexity
from benchmarks.decoders.tokens import encode, train_tokenizer, windows


def test_learning_rate_rises_then_falls() -> None:
    config = TrainConfig(lr=1.0, warmup=10)
    rates = [config.lr_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)


def test_perplexity_weighs_all_tokens_alike(tiny_corpus: Corpus, config: TrainConfig) -> None:
    tokenizer = train_tokenizer([file.text for file in tiny_corpus.files], config.vocab_size)
    model = build_model(config, tokenizer)
    rows = windows(encode(tokenizer, [tiny_corpus.files[0].text]), config.seq_len)[:7]
    with torch.no_grad():
        library_loss = float(model(input_ids=rows, labels=rows).loss)
        assert float(next_token_loss(model, rows)) == pytest.approx(library_loss, rel=1e-6)
    assert perplexity(model, rows, 3) == pytest.approx(math.exp(library_loss), rel=1e-5)
