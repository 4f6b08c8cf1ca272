"""Rows to token sequences through the model's tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from gisp.config.options import CHOOSING
from gisp.data.encode import Pair, PairEncoder
from gisp.data.rows import Kind
from gisp.data.sequences import IGNORED, Row, Sequences
from gisp.data.token_files import cut
from gisp.errors import GispError

# Changes whenever the same rows give other tokens, labels or examples.
FORMAT_VERSION = 2


def tokenise(
    rows: list[dict[str, Any]], kind: Kind, encoder: PairEncoder, seq_len: int, objective: str, spec: str
) -> Sequences:
    """Sequences of rows of one kind.

    Rows of ``text`` are joined with the end-of-text token, without other special tokens; a ``document`` has those the
    tokenizer gives a text, at its very beginning or end. Both are cut into rows of ``seq_len`` tokens. A completion's
    or an answer's tokens alone are scored; of a conversation all tokens (``lm``) or the last assistant turn. Longer
    examples keep their last ``seq_len`` tokens, conversations scored as a whole are cut into pieces of one example.

    Raises:
        GispError: nothing to score, or a conversation the tokenizer cannot render.
    """
    if kind == "document":
        return _windows(encoder.text(rows[0]["text"]), seq_len, spec)
    if kind == "text":
        return _windows(_joined(rows, encoder), seq_len, spec)
    places = [f"{spec}: row {number}" for number in range(len(rows))]
    if kind == "choices":
        return _choices(rows, encoder, seq_len, objective, places)
    if kind == "messages" and objective == "lm":
        return _conversations(rows, encoder, seq_len, places)
    found = []
    for row, where in zip(rows, places, strict=True):
        if kind == "messages":
            context, continuation = encoder.last_turn(row["messages"], where)
        else:
            context, continuation = row["prompt"], row["completion"]
        found.append(_scored(encoder.pair(context, continuation, where), seq_len))
    return Sequences.plain(found)


def _joined(rows: list[dict[str, Any]], encoder: PairEncoder) -> list[int]:
    end = encoder.tokenizer.eos_token_id
    ends = [] if end is None else [end]
    return [token for row in rows for token in (*encoder.inside(row["text"]), *ends)]


def _windows(stream: list[int], seq_len: int, spec: str) -> Sequences:
    usable = len(stream) // seq_len * seq_len or len(stream)
    if usable < 2:
        raise GispError(f"{spec} holds {len(stream)} tokens: give more text")
    pieces = torch.tensor(stream[:usable]).split(seq_len)
    return Sequences.plain([(piece, piece) for piece in pieces])


def _conversations(rows: list[dict[str, Any]], encoder: PairEncoder, seq_len: int, places: list[str]) -> Sequences:
    examples: list[list[Row]] = []
    for row, where in zip(rows, places, strict=True):
        text = encoder.conversation(row["messages"], where)
        ids = torch.tensor(encoder.text(text), dtype=torch.int64)
        pieces = cut(ids, ids, seq_len)
        if not pieces:
            raise GispError(f"{where}: a conversation has {len(ids)} tokens: remove it ({text[:40]!r})")
        examples.append(pieces)
    return Sequences.grouped(examples)


def _choices(
    rows: list[dict[str, Any]], encoder: PairEncoder, seq_len: int, objective: str, places: list[str]
) -> Sequences:
    examples: list[list[Row]] = []
    signs: list[int] = []
    for row, where in zip(rows, places, strict=True):
        taken = range(len(row["choices"])) if objective in CHOOSING else (row["answer"],)
        pairs = encoder.choices(row, where)
        examples.append([_scored(encoder.pair(*pairs[number], where), seq_len) for number in taken])
        signs += [1 if number == row["answer"] else -1 for number in taken]
    return Sequences.grouped(examples, signs)


def _scored(pair: Pair, seq_len: int) -> Row:
    """One sequence whose continuation alone is scored, its last ``seq_len`` tokens."""
    ids = torch.tensor([*pair.context, *pair.continuation])[-seq_len:]
    labels = ids.clone()
    # The first token of a sequence has nothing before it to be predicted from.
    labels[: max(1, len(ids) - len(pair.continuation))] = IGNORED
    return ids, labels
