"""Rows to token sequences through the model's tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from gisp.config.options import CHOOSING
from gisp.data.chat import conversation, last_turn
from gisp.data.rows import Kind
from gisp.data.sequences import IGNORED, Row, Sequences
from gisp.data.token_files import cut
from gisp.errors import GispError

# Changes whenever the same rows give other tokens, labels or examples.
FORMAT_VERSION = 1


def load_tokenizer(tokenizer_from: str | None, spec: str) -> Any:
    """The tokenizer beside a model; text cannot be read without one."""
    from transformers import AutoTokenizer

    if tokenizer_from is None:
        raise GispError(f"{spec} is text and no tokenizer is known: give token ids or a model with a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(tokenizer_from)
    except Exception as error:  # tokenizers raise many types for a missing or broken file
        reason = " ".join(str(error).split())[:200]
        raise GispError(f"{spec} is text and {tokenizer_from} has no usable tokenizer: {reason}") from None


def tokenise(
    rows: list[dict[str, Any]], kind: Kind, tokenizer: Any, seq_len: int, objective: str, spec: str
) -> Sequences:
    """Sequences of rows of one kind.

    Rows of ``text`` are joined with the end-of-text token and cut into rows of ``seq_len`` tokens. A completion's or
    an answer's tokens alone are scored; of a conversation all tokens (``lm``) or the last assistant turn. Longer
    examples keep their last ``seq_len`` tokens, conversations scored as a whole are cut into pieces of one example.

    Raises:
        GispError: nothing to score, or a conversation the tokenizer cannot render.
    """
    if kind == "text":
        return _pack(rows, tokenizer, seq_len, spec)
    if kind == "choices":
        return _choices(rows, tokenizer, seq_len, objective, spec)
    if kind == "messages" and objective == "lm":
        return _conversations(rows, tokenizer, seq_len, spec)
    if kind == "messages":
        pairs = [last_turn(tokenizer, row["messages"], spec) for row in rows]
    else:
        pairs = [(row["prompt"], row["completion"]) for row in rows]
    joined = kind == "messages"
    return Sequences.plain([_scored_tail(tokenizer, *pair, joined, seq_len, spec) for pair in pairs])


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _pack(rows: list[dict[str, Any]], tokenizer: Any, seq_len: int, spec: str) -> Sequences:
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for row in rows:
        stream += _encode(tokenizer, row["text"])
        if end is not None:
            stream.append(end)
    usable = len(stream) // seq_len * seq_len or len(stream)
    if usable < 2:
        raise GispError(f"{spec} holds {len(stream)} tokens: give more text")
    pieces = torch.tensor(stream[:usable]).split(seq_len)
    return Sequences.plain([(piece, piece) for piece in pieces])


def _conversations(rows: list[dict[str, Any]], tokenizer: Any, seq_len: int, spec: str) -> Sequences:
    sequences: list[Row] = []
    examples: list[tuple[int, ...]] = []
    for row in rows:
        text = conversation(tokenizer, row["messages"], spec)
        ids = torch.tensor(_encode(tokenizer, text), dtype=torch.int64)
        pieces = cut(ids, ids, seq_len)
        if not pieces:
            raise GispError(f"{spec}: a conversation has {len(ids)} tokens: remove it ({text[:40]!r})")
        examples.append(tuple(range(len(sequences), len(sequences) + len(pieces))))
        sequences += pieces
    return Sequences(tuple(sequences), (1,) * len(sequences), tuple(examples))


def _choices(rows: list[dict[str, Any]], tokenizer: Any, seq_len: int, objective: str, spec: str) -> Sequences:
    sequences: list[Row] = []
    signs: list[int] = []
    examples: list[tuple[int, ...]] = []
    for row in rows:
        numbers = []
        asked = row.get("contexts")
        if asked is None and isinstance(row.get("context"), str):
            asked = [row["context"]] * len(row["choices"])
        for i, choice in enumerate(map(str, row["choices"])):
            gold = i == row["answer"]
            if not gold and objective not in CHOOSING:
                continue
            if asked is None:
                pair = last_turn(tokenizer, [*row["messages"], {"role": "assistant", "content": choice}], spec)
            else:
                pair = (asked[i], choice)
            numbers.append(len(sequences))
            sequences.append(_scored_tail(tokenizer, *pair, asked is None, seq_len, spec))
            signs.append(1 if gold else -1)
        examples.append(tuple(numbers))
    return Sequences(tuple(sequences), tuple(signs), tuple(examples))


def _scored_tail(tokenizer: Any, prompt: str, completion: str, joined: bool, seq_len: int, spec: str) -> Row:
    """One sequence whose completion tokens alone are scored."""
    head, tail = _encode_pair(tokenizer, prompt, completion, joined or completion[:1].isspace())
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if not head and start is not None:
        head = [start]
    if not tail or not head:
        raise GispError(f"{spec}: a row has an empty prompt or completion: {prompt[:40]!r}, {completion[:40]!r}")
    ids = torch.tensor(head + tail)
    labels = ids.clone()
    labels[: len(head)] = IGNORED
    labels = labels[-seq_len:]
    # The first token of a sequence has nothing before it to be predicted from.
    labels[0] = IGNORED
    return ids[-seq_len:], labels


def _encode_pair(tokenizer: Any, prompt: str, completion: str, joined: bool) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of what follows it.

    ``joined``: as one text, where its tokens begin with the prompt's (as lm-eval does). A tokenizer that marks the
    beginning of a text as that of a word would otherwise see two spaces in front of a completion that begins with one.
    """
    head = _encode(tokenizer, prompt)
    if joined:
        whole = _encode(tokenizer, prompt + completion)
        if whole[: len(head)] == head:
            return head, whole[len(head) :]
    return head, _encode(tokenizer, completion)
