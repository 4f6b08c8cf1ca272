"""Data of the study: a decoder with its calibration and evaluation tokens, taken or trained on local text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gisp.data import Sequences, load_sequences
from gisp.demo import corpus as corpora
from gisp.demo.llama import TrainConfig
from gisp.demo.tokens import encode, windows
from gisp.demo.train import train
from gisp.errors import GispError
from gisp.evaluation.choices import Choice
from gisp.evaluation.pairs import Request
from gisp.objectives import IGNORED

# 65 million parameters: 12 layers, hidden size 640, 10 heads of 64, MLP 1728, vocabulary 8192, tied embeddings.
LARGE = TrainConfig(vocab_size=8192, layers=12, hidden=640, heads=10, mlp=1728, batch=256, steps=4000, lr=2e-3)
CALIBRATION_ROWS, EVALUATION_ROWS = 8000, 1024
# A choice: the context's tokens, the continuation's tokens, and how many continuations to choose from.
CONTEXT, CONTINUATION, CHOICES = 48, 12, 4
# Wrong choices: what comes later in the row, or the right one with one token replaced by another of the context's.
TASKS = ("continuation", "replacement")


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


def train_decoder(out: Path, corpus: Path, seconds: float | None, config: TrainConfig = LARGE) -> Decoder:
    """Train a decoder on the text of ``corpus`` (a folder of Python source or ``.jsonl.gz``), with its token files.

    Calibration rows are drawn from the training text, evaluation rows from held-out files.

    Raises:
        GispError: too little text.
    """
    text = corpora.load(corpus)
    try:
        train(text, out, config, max_seconds=seconds, compiled=torch.cuda.is_available())
    except ValueError as error:
        raise GispError(f"corpus {corpus}: {error}") from None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    decoder = Decoder(out, out / "calibration.safetensors", out / "evaluation.safetensors")
    kept, heldout = text.split()
    for path, files, rows in (
        (decoder.calibration, kept, CALIBRATION_ROWS),
        (decoder.evaluation, heldout, EVALUATION_ROWS),
    ):
        found = windows(encode(tokenizer, [file.text for file in files]), config.seq_len)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(1))
        save_file({"input_ids": found[order[:rows]].int().contiguous()}, path)
    return decoder


def described(path: Path) -> dict[str, Any]:
    """What is known of how a decoder was trained."""
    record = path / "training.json"
    if not record.is_file():
        return {}
    found = json.loads(record.read_text(encoding="utf-8"))
    return {
        key: found[key]
        for key in ("heldout_perplexity", "tokens", "training_tokens", "seconds", "parameters", "device")
    }


def read_tokens(path: Path, vocab_size: int, rows: int | None = None) -> Sequences:
    """A token file, its first rows."""
    return load_sequences(str(path), vocab_size=vocab_size, seq_len=None).first(rows)


def drawn(data: Sequences, tokens: int | None, seed: int) -> Sequences:
    """Rows of about ``tokens`` tokens in all, drawn by the seed; all rows in the seed's order for ``None``."""
    order = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(1000 + seed)).tolist()
    count = len(order) if tokens is None else max(1, tokens // len(data.rows[0][0]))
    return Sequences.plain([data.rows[i] for i in order[:count]])


def _choice_tokens(data: Sequences, task: str) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Per row its first tokens and continuations to choose from, the right one first; rows that give none left out."""
    pieces_of = {"continuation": _continuations, "replacement": _replacements}[task]
    found = []
    for ids, _ in data.rows:
        pieces = pieces_of(ids)
        if pieces:
            found.append((ids[:CONTEXT], pieces))
    return found


def _continuations(ids: torch.Tensor) -> list[torch.Tensor]:
    """The continuation and those later in the row."""
    need = CONTEXT + CHOICES * CONTINUATION
    return list(ids[CONTEXT:need].split(CONTINUATION)) if len(ids) >= need else []


def _replacements(ids: torch.Tensor) -> list[torch.Tensor]:
    """The continuation, and the same with one token replaced, as in WinoGrande: which of the context's tokens fits.

    Replaced is the token that the context has but has least often, neither the first nor the last; in its place stand
    the latest tokens that the context has at most twice.
    """
    context, right = ids[:CONTEXT].tolist(), ids[CONTEXT : CONTEXT + CONTINUATION]
    places = [i for i, token in enumerate(right.tolist()[1:-1], 1) if token in context]
    if len(right) < CONTINUATION or not places:
        return []
    place = min(places, key=lambda i: context.count(int(right[i])))
    others = [t for t in dict.fromkeys(reversed(context)) if t != int(right[place]) and context.count(t) <= 2]
    if len(others) < CHOICES - 1:
        return []
    wrong = right.repeat(CHOICES - 1, 1)
    wrong[:, place] = torch.tensor(others[: CHOICES - 1])
    return [right, *wrong]


def choice_sequences(data: Sequences, task: str) -> Sequences:
    """Calibration examples of a choice task: the right continuation with sign +1, the others -1."""
    rows, signs, examples = [], [], []
    for context, pieces in _choice_tokens(data, task):
        numbers = []
        for i, piece in enumerate(pieces):
            ids = torch.cat((context, piece))
            labels = ids.clone()
            labels[: len(context)] = IGNORED
            numbers.append(len(rows))
            rows.append((ids, labels))
            signs.append(-1 if i else 1)
        examples.append(tuple(numbers))
    return Sequences(tuple(rows), tuple(signs), tuple(examples))


def gold_sequences(data: Sequences, task: str) -> Sequences:
    """The right continuations of a choice task alone."""
    every = choice_sequences(data, task)
    return Sequences.plain([row for row, sign in zip(every.rows, every.signs, strict=True) if sign > 0])


def choice_questions(data: Sequences, task: str) -> list[Choice]:
    """Evaluation questions of a choice task; the place of the right choice does not matter, its score does."""
    found = []
    for context, pieces in _choice_tokens(data, task):
        requests = [
            Request(tuple(torch.cat((context, piece))[:-1].tolist()), tuple(piece.tolist()), False) for piece in pieces
        ]
        found.append(Choice(tuple(requests), tuple("x" for _ in pieces), 0))
    return found
