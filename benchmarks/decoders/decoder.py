"""The decoder of a study with its calibration and evaluation tokens, taken or trained on local text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from benchmarks.decoders.corpus import load
from benchmarks.decoders.llama import TrainConfig
from benchmarks.decoders.tokens import encode, windows
from benchmarks.decoders.train import RECORD, train

# 65 million parameters: 12 layers, hidden size 640, 10 heads of 64, MLP 1728, vocabulary 8192, tied embeddings.
LARGE = TrainConfig(vocab_size=8192, layers=12, hidden=640, heads=10, mlp=1728, batch=256, steps=4000, lr=2e-3)
CALIBRATION_ROWS, EVALUATION_ROWS = 8000, 1024


@dataclass(frozen=True)
class Decoder:
    """A trained decoder.

    Attributes:
        path: Hugging Face folder.
        calibration, evaluation: token files beside it or elsewhere.
    """

    path: Path
    calibration: Path
    evaluation: Path

    @classmethod
    def trained(cls, path: Path) -> Decoder:
        """The decoder that :func:`train_decoder` left in a folder."""
        return cls(path, path / "calibration.safetensors", path / "evaluation.safetensors")


def train_decoder(out: Path, corpus: Path, seconds: float | None, config: TrainConfig = LARGE) -> None:
    """Train a decoder on the text of ``corpus`` (a folder of Python source or ``.jsonl.gz``), with its token files.

    Calibration rows are drawn from the training text, evaluation rows from held-out files.

    Raises:
        GispError: no corpus, or too little text.
    """
    text = load(corpus)
    train(text, out, config, max_seconds=seconds, compiled=torch.cuda.is_available())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out, trust_remote_code=False)
    decoder = Decoder.trained(out)
    kept, heldout = text.texts()
    for path, texts, rows in (
        (decoder.calibration, kept, CALIBRATION_ROWS),
        (decoder.evaluation, heldout, EVALUATION_ROWS),
    ):
        found = windows(encode(tokenizer, texts), config.seq_len)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(1))
        save_file({"input_ids": found[order[:rows]].int().contiguous()}, path)


def described(path: Path) -> dict[str, Any]:
    """What is known of how a decoder was trained."""
    record = path / RECORD
    if not record.is_file():
        return {}
    found = json.loads(record.read_text(encoding="utf-8"))
    return {
        key: found[key]
        for key in ("heldout_perplexity", "tokens", "training_tokens", "seconds", "parameters", "device")
    }
