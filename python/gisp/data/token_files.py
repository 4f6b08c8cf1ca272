"""Sequences from token ids, a tensor or a safetensors file of them, and whole sequences as a file of this package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from gisp.data.sequences import IGNORED, Row, Sequences
from gisp.data.sources import check_spec
from gisp.errors import GispError

_CHECKSUM = "sha256"
_TOKENS = ("input_ids", "labels", "attention_mask")
_PARTS = ("ids", "labels", "lengths", "signs", "examples")


def from_token_file(path: Path, vocab_size: int, seq_len: int | None) -> Sequences:
    """Sequences of a ``.safetensors`` with ``input_ids`` int [N, S] and optional ``labels`` of the same shape.

    Raises:
        GispError: a file that cannot be read, or holds other tensors, shapes or ids beyond the vocabulary.
    """
    check_spec(str(path))
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_tensor(key) if key in _TOKENS else None for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        where = " ".join(str(error).split())
        raise GispError(f"{path} is not a readable safetensors file: {where}") from None
    return from_token_tensors(found, str(path), vocab_size, seq_len)


def from_token_tensors(
    tensors: Mapping[str, torch.Tensor | None], where: str, vocab_size: int, seq_len: int | None
) -> Sequences:
    """Sequences of ``input_ids`` int [N, S], optional ``labels`` and an optional ``attention_mask`` of the same shape.

    Args:
        tensors: these by name, and others that are not read.

    Raises:
        GispError: no tensors, or as :func:`from_tokens`; ``where`` names them.
    """
    if "input_ids" not in tensors:
        raise GispError(f"{where} holds {', '.join(map(str, tensors)) or 'nothing'}: it must hold input_ids")
    found = {name: tensors[name] for name in _TOKENS if tensors.get(name) is not None}
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor):
            raise GispError(f"{where}: {name} is a {type(tensor).__name__}, it must be a tensor [sequences, tokens]")
    ids, labels, mask = (found.get(name) for name in _TOKENS)
    if ids is None:
        raise GispError(f"{where}: input_ids is None, it must be a tensor [sequences, tokens]")
    sequences = from_tokens(ids, labels, where, vocab_size, seq_len)
    if mask is not None:
        _check_mask(mask, ids, labels, where)
    return sequences


def from_tokens(
    ids: torch.Tensor, labels: torch.Tensor | None, where: str, vocab_size: int, seq_len: int | None
) -> Sequences:
    """Sequences of ids [N, S], a row longer than ``seq_len`` in pieces; ``labels`` are the ids where there are none.

    Raises:
        GispError: other shapes or dtypes, ids beyond the vocabulary, or nothing to score; ``where`` names the tokens.
    """
    # Memory of any other kind has no numbers that can be read one by one.
    if ids.layout != torch.strided or ids.is_meta or ids.is_quantized or ids.is_nested:
        raise GispError(f"{where}: input_ids is no dense tensor with numbers in memory: give one [sequences, tokens]")
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
    examples: list[list[Row]] = []
    for number, pair in enumerate(zip(ids, labels, strict=True)):
        pieces = cut(*pair, seq_len)
        if not pieces:
            raise GispError(f"{where}: sequence {number} has no scored token: remove it or give it labels")
        examples.append(pieces)
    return Sequences.grouped(examples)


def cut(ids: torch.Tensor, labels: torch.Tensor, seq_len: int | None) -> list[Row]:
    """A row, ids and labels int64 [S], in pieces of at most ``seq_len``, those that have a scored token."""
    size = seq_len or len(ids)
    pieces = zip(ids.split(size), labels.split(size), strict=True)
    return [piece for piece in pieces if bool((piece[1][1:] != IGNORED).any())]


def _check_integers(values: torch.Tensor, name: str, where: str) -> None:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise GispError(f"{where}: {name} is {values.dtype}, it must hold integers")


def _check_mask(mask: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor | None, where: str) -> None:
    """Refuse padding that would be read as text: only what is on the right and not scored changes no loss."""
    if mask.shape != ids.shape:
        raise GispError(f"{where}: attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)} differ in shape")
    padding = mask.cpu() == 0
    inside = padding[:, :-1] & ~padding[:, 1:]
    scored = padding if labels is None else padding & (labels.cpu() != IGNORED)
    if bool(inside.any()) or bool(scored.any()):
        raise GispError(
            f"{where}: attention_mask leaves out tokens that are scored or stand before others: "
            "pad on the right and give these tokens the label -100, or give the rows as text"
        )


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


def stored_sequences(sequences: Sequences) -> bytes:
    """A safetensors file, int32 but for names of kinds, of sequences whose examples are consecutive; without tasks."""
    names = sorted(set(sequences.kinds))
    tensors = {
        "ids": torch.cat([ids for ids, _ in sequences.rows]).int(),
        "labels": torch.cat([labels for _, labels in sequences.rows]).int(),
        "lengths": torch.tensor([len(ids) for ids, _ in sequences.rows]).int(),
        "signs": torch.tensor(sequences.signs).int(),
        "examples": torch.tensor([len(example) for example in sequences.examples]).int(),
    }
    if names:
        tensors["kinds"] = torch.tensor([names.index(kind) for kind in sequences.kinds]).int()
        tensors["names"] = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
    return bytes(save(tensors, {_CHECKSUM: _checksum(sequences)}))


def read_sequences(path: Path) -> Sequences | None:
    """The sequences of a file of :func:`stored_sequences`, ``None`` if it is not there or not sound."""
    try:
        with safe_open(path, framework="pt") as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM)
            found = {name: file.get_tensor(name) for name in (*_PARTS, *({"kinds", "names"} & set(file.keys())))}
        lengths = found["lengths"].tolist()
        rows = list(zip(found["ids"].long().split(lengths), found["labels"].long().split(lengths), strict=True))
        ends = accumulate(found["examples"].tolist(), initial=0)
        groups = [rows[start:end] for start, end in pairwise(ends)]
        kinds: list[str] = []
        if "kinds" in found:
            names = json.loads(found["names"].numpy().tobytes())
            kinds = [str(names[number]) for number in found["kinds"].tolist()]
        sequences = Sequences.grouped(groups, found["signs"].tolist(), kinds=kinds)
        return sequences if _checksum(sequences) == checksum else None
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError):
        return None


def _checksum(sequences: Sequences) -> str:
    parts = [sequences.digest(), ",".join(str(len(example)) for example in sequences.examples)]
    if sequences.kinds:
        parts.append(json.dumps(sequences.kinds))
    return hashlib.sha256(";".join(parts).encode()).hexdigest()
