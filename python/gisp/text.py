"""Text to token sequences: jsonl, txt and parquet files and named datasets, through the model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from gisp.data import Row, Sequences
from gisp.errors import GispError
from gisp.objectives import IGNORED

# Short names for datasets on the hub: (path, configuration, split to evaluate on); calibration takes the train split.
NAMED_DATASETS: dict[str, tuple[str, str | None, str]] = {
    "c4": ("allenai/c4", "en", "validation"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train"),
}
_STREAMED_ROWS = 20000
_TEXT_FILES = (".jsonl", ".txt", ".parquet")
FORMATS = "text, prompt and completion, or context, choices and answer"


def sequences_from_text(
    spec: str, tokenizer_from: str | None, seq_len: int, objective: str, vocab_size: int, held_out: bool = False
) -> Sequences:
    """Tokenised sequences of a text SPEC.

    Rows of ``text`` are joined with the end-of-text token and cut into rows of ``seq_len`` tokens. A completion's or
    an answer's tokens alone are scored. Longer examples keep their last ``seq_len`` tokens.
    """
    rows = list(read_rows(spec, held_out))
    if not rows:
        raise GispError(f"{spec} holds no rows: give rows of {FORMATS}")
    tokenizer = load_tokenizer(tokenizer_from, spec)
    kind = _kind(rows[0], spec, 0)
    for number, row in enumerate(rows):
        if _kind(row, spec, number) != kind:
            raise GispError(f"{spec}: row {number} is not of the same kind as row 0 ({kind})")
    if kind == "text":
        sequences = _pack(rows, tokenizer, seq_len, spec)
    elif kind == "completion":
        sequences = Sequences.plain(
            [_scored_tail(tokenizer, row["prompt"], row["completion"], seq_len, spec) for row in rows]
        )
    else:
        sequences = _choices(rows, tokenizer, seq_len, objective, spec)
    highest = max(int(ids.max()) for ids, _ in sequences.rows)
    if highest >= vocab_size:
        raise GispError(f"{spec}: the tokenizer gives token {highest}, the model's vocabulary is {vocab_size}")
    return sequences


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


def read_rows(spec: str, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of a text file or named dataset as dictionaries."""
    path = Path(spec)
    if path.suffix not in _TEXT_FILES:
        yield from _dataset_rows(spec, held_out)
        return
    if not path.is_file():
        raise GispError(f"data file {path} does not exist: give an existing .safetensors, .jsonl, .txt or .parquet")
    try:
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8")
            yield from ([{"text": text}] if text.strip() else [])
        elif path.suffix == ".jsonl":
            yield from _json_rows(path)
        else:
            yield from _parquet_rows(path)
    except UnicodeDecodeError as error:
        raise GispError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise GispError(f"cannot read {path}: {error.strerror or error}") from None


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise GispError(f"{path} line {number} is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise GispError(f"{path} line {number} holds a {type(row).__name__}: give an object with {FORMATS}")
            yield row


def _parquet_rows(path: Path) -> Iterable[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise GispError(f"{path}: reading parquet needs pyarrow: pip install 'gisp-kernels[data]'") from None
    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.lib.ArrowException, ValueError) as error:
        raise GispError(f"{path} is not a readable parquet file: {' '.join(str(error).split())}") from None


def _dataset_rows(name: str, held_out: bool) -> Iterator[dict[str, Any]]:
    if name not in NAMED_DATASETS:
        known = ", ".join(NAMED_DATASETS)
        raise GispError(
            f"data {name!r} is neither a .safetensors, .jsonl, .txt or .parquet file nor a named dataset ({known})"
        )
    try:
        import datasets
    except ImportError:
        raise GispError(f"dataset {name!r} needs the datasets library: pip install 'gisp-kernels[data]'") from None
    path, configuration, evaluation_split = NAMED_DATASETS[name]
    split = evaluation_split if held_out else "train"
    try:
        stream = datasets.load_dataset(path, configuration, split=split, streaming=True)
        yield from (dict(row) for row in stream.take(_STREAMED_ROWS) if str(row.get("text", "")).strip())
    except Exception as error:  # network, hub and format failures have no common type
        raise GispError(f"dataset {name!r} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _kind(row: dict[str, Any], spec: str, number: int) -> str:
    if isinstance(row.get("text"), str):
        return "text"
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return "completion"
    choices = row.get("choices")
    if isinstance(row.get("context"), str) and isinstance(choices, list):
        answer = row.get("answer")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise GispError(
                f"{spec}: row {number} has answer {answer!r}: give the index of one of {len(choices)} choices"
            )
        return "choices"
    raise GispError(f"{spec}: row {number} has keys {', '.join(map(str, row)) or 'none'}: give {FORMATS}")


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


def _scored_tail(tokenizer: Any, prompt: str, completion: str, seq_len: int, spec: str) -> Row:
    """One sequence whose completion tokens alone are scored."""
    head, tail = _encode(tokenizer, prompt), _encode(tokenizer, completion)
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


def _choices(rows: list[dict[str, Any]], tokenizer: Any, seq_len: int, objective: str, spec: str) -> Sequences:
    sequences: list[Row] = []
    signs: list[int] = []
    examples: list[tuple[int, ...]] = []
    for row in rows:
        numbers = []
        for i, choice in enumerate(row["choices"]):
            gold = i == row["answer"]
            if not gold and objective != "margin":
                continue
            numbers.append(len(sequences))
            sequences.append(_scored_tail(tokenizer, row["context"], str(choice), seq_len, spec))
            signs.append(1 if gold else -1)
        examples.append(tuple(numbers))
    return Sequences(tuple(sequences), tuple(signs), tuple(examples))
