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


Row = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sequences:
    """Token sequences of any lengths, grouped into examples.

    Attributes:
        rows: per sequence (input_ids int64 [S], labels int64 [S], -100 = not scored).
        signs: per sequence +1, or -1 for a wrong answer of a choice example.
        examples: per example the sequence numbers it holds (the pieces of a row, or the gold and the wrong answers of
            a choice).
    """

    rows: tuple[Row, ...]
    signs: tuple[int, ...]
    examples: tuple[tuple[int, ...], ...]

    @classmethod
    def plain(cls, rows: list[Row]) -> Sequences:
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
    held_out: bool = False,
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
        held_out: of a named dataset, take its test or validation split instead of the training split.

    Raises:
        GispError: anything unreadable, empty, of the wrong type or out of range.
    """
    if not isinstance(spec, (torch.Tensor, str, Path)):
        raise GispError(f"data is a {type(spec).__name__}: give an int tensor [sequences, tokens], a path or a name")
    if isinstance(spec, torch.Tensor):
        sequences = _from_tokens(spec, None, "the token tensor", vocab_size, seq_len)
    elif str(spec).endswith(".safetensors"):
        sequences = _from_file(Path(spec), vocab_size, seq_len)
    else:
        from gisp.text import sequences_from_text

        sequences = sequences_from_text(
            str(spec), tokenizer_from, seq_len or DEFAULT_SEQ_LEN, objective, vocab_size, held_out
        )
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
    rows: list[Row] = []
    examples: list[tuple[int, ...]] = []
    for number, pair in enumerate(zip(ids, labels, strict=True)):
        pieces = _cut(*pair, seq_len)
        if not pieces:
            raise GispError(f"{where}: sequence {number} has no scored token: remove it or give it labels")
        examples.append(tuple(range(len(rows), len(rows) + len(pieces))))
        rows += pieces
    return Sequences(tuple(rows), (1,) * len(rows), tuple(examples))


def _cut(ids: torch.Tensor, labels: torch.Tensor, seq_len: int | None) -> list[Row]:
    """A row in pieces of at most ``seq_len``, those that have a scored token."""
    size = seq_len or len(ids)
    pieces = zip(ids.split(size), labels.split(size), strict=True)
    return [piece for piece in pieces if bool((piece[1][1:] != IGNORED).any())]


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
