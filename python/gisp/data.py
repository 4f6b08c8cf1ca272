"""Calibration and evaluation sequences from token files, text files or named datasets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gisp.errors import GispError
from gisp.objectives import IGNORED

DEFAULT_SEQ_LEN = 256


@dataclass(frozen=True)
class Sequences:
    """Token sequences of any lengths, grouped into examples.

    Attributes:
        rows: per sequence (input_ids int64 [S], labels int64 [S], -100 = not scored).
        signs: per sequence +1, or -1 for a wrong answer of a choice example.
        examples: per example the sequence numbers it holds (one, or the gold and the wrong answers of a choice).
    """

    rows: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    signs: tuple[int, ...]
    examples: tuple[tuple[int, ...], ...]

    @classmethod
    def plain(cls, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> Sequences:
        """One example per sequence."""
        return cls(tuple(rows), (1,) * len(rows), tuple((i,) for i in range(len(rows))))

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, examples: int | None) -> Sequences:
        """The first examples in order, all for ``None``."""
        if examples is None or examples >= len(self.examples):
            return self
        chosen = self.examples[:examples]
        last = max(max(rows) for rows in chosen) + 1
        return Sequences(self.rows[:last], self.signs[:last], chosen)

    def digest(self) -> str:
        """SHA-256 over all tokens, labels and signs."""
        digest = hashlib.sha256()
        for (ids, labels), sign in zip(self.rows, self.signs, strict=True):
            digest.update(f"{len(ids)},{sign};".encode())
            digest.update(ids.numpy().tobytes())
            digest.update(labels.numpy().tobytes())
        return digest.hexdigest()

    def batch(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences by number as (input_ids, labels), int64 [B, S], padded on the right with token 0 and -100."""
        rows = [self.rows[i] for i in numbers]
        ids = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence([row[1] for row in rows], batch_first=True, padding_value=IGNORED)
        return ids, labels


def load_sequences(
    spec: Any,
    *,
    vocab_size: int,
    seq_len: int | None,
    tokenizer_from: str | None = None,
    objective: str = "lm",
) -> Sequences:
    """Sequences from a SPEC.

    Args:
        spec: an int tensor [N, S]; a ``.safetensors`` with ``input_ids`` int [N, S] and optional ``labels``; a
            ``.jsonl``, ``.txt`` or ``.parquet`` of ``text``, ``prompt``/``completion`` or
            ``context``/``choices``/``answer``; or the name of a dataset.
        vocab_size: token ids must lie below it.
        seq_len: sequences are cut to this length; ``None`` = token rows as they are, text in rows of 256.
        tokenizer_from: model folder or name whose tokenizer reads text.
        objective: ``margin`` needs choices; ``lm`` takes their gold answer alone.

    Raises:
        GispError: anything unreadable, empty, of the wrong type or out of range.
    """
    if isinstance(spec, torch.Tensor):
        sequences = _from_tokens(spec, None, "the token tensor", vocab_size, seq_len)
    elif str(spec).endswith(".safetensors"):
        sequences = _from_file(Path(spec), vocab_size, seq_len)
    else:
        from gisp.text import sequences_from_text

        sequences = sequences_from_text(str(spec), tokenizer_from, seq_len or DEFAULT_SEQ_LEN, objective, vocab_size)
    if objective == "margin" and len(set(sequences.signs)) != 2:
        raise GispError(f"{spec}: --objective margin needs rows of context, choices and answer")
    return sequences


def _from_file(path: Path, vocab_size: int, seq_len: int | None) -> Sequences:
    if not path.is_file():
        raise GispError(f"token file {path} does not exist: give an existing .safetensors, .jsonl, .txt or .parquet")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            found = {key: file.get_tensor(key) for key in ("input_ids", "labels") if key in keys}
    except (SafetensorError, OSError, ValueError) as error:
        where = " ".join(str(error).split())
        raise GispError(f"{path} is not a readable safetensors file: {where}") from None
    if "input_ids" not in found:
        raise GispError(f"{path} holds {', '.join(keys) or 'nothing'}: it must hold input_ids")
    return _from_tokens(found["input_ids"], found.get("labels"), str(path), vocab_size, seq_len)


def _from_tokens(
    ids: torch.Tensor, labels: torch.Tensor | None, where: str, vocab_size: int, seq_len: int | None
) -> Sequences:
    _check_integers(ids, "input_ids", where)
    if ids.dim() != 2:
        raise GispError(f"{where}: input_ids has shape {tuple(ids.shape)}, it must be [sequences, tokens]")
    if ids.shape[0] == 0 or ids.shape[1] < 2:
        raise GispError(f"{where}: input_ids is {tuple(ids.shape)}: give at least one sequence of two tokens")
    ids = ids.long().cpu()
    _check_range(ids, "input_ids", where, vocab_size)
    if labels is None:
        labels = ids
    else:
        _check_integers(labels, "labels", where)
        if labels.shape != ids.shape:
            raise GispError(
                f"{where}: labels {tuple(labels.shape)} and input_ids {tuple(ids.shape)} must have one shape"
            )
        labels = labels.long().cpu()
        _check_range(labels[labels != IGNORED], "labels", where, vocab_size)
    rows = [row for pair in zip(ids, labels, strict=True) for row in _cut(*pair, seq_len)]
    return checked_rows(rows, where)


def _cut(ids: torch.Tensor, labels: torch.Tensor, seq_len: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A row in pieces of at most ``seq_len``; a last piece of one token predicts nothing and is dropped."""
    size = seq_len or len(ids)
    pieces = zip(ids.split(size), labels.split(size), strict=True)
    return [(i, t) for i, t in pieces if len(i) > 1]


def checked_rows(rows: list[tuple[torch.Tensor, torch.Tensor]], where: str) -> Sequences:
    """Plain sequences, each with at least one scored token."""
    for number, (_, labels) in enumerate(rows):
        if not bool((labels[1:] != IGNORED).any()):
            raise GispError(f"{where}: sequence {number} has no scored token: remove it or give it labels")
    return Sequences.plain(rows)


def _check_integers(values: torch.Tensor, name: str, where: str) -> None:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise GispError(f"{where}: {name} is {values.dtype}, it must hold integers")


def _check_range(values: torch.Tensor, name: str, where: str, vocab_size: int) -> None:
    if values.numel() == 0:
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise GispError(
            f"{where}: {name} holds {bad}, outside the model's vocabulary of {vocab_size}: "
            "use tokens of this model's tokenizer"
        )
