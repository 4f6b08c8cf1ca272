"""From a SPEC to sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gisp.config.options import CHOOSING
from gisp.data.cache import cache_entry, read_entry, write_entry
from gisp.data.encode import PairEncoder, check_vocabulary, load_tokenizer
from gisp.data.mixture import MIXTURE_FILES, Entry, read_mixture
from gisp.data.rows import kind_of_rows
from gisp.data.sequences import IGNORED, Sequences, Task
from gisp.data.sources import is_document, read_rows
from gisp.data.token_files import from_token_file, from_token_tensors, from_tokens
from gisp.data.tokenise import tokenise
from gisp.errors import GispError
from gisp.progress import task

DEFAULT_SEQ_LEN = 256


def load_sequences(
    spec: Any,
    *,
    vocab_size: int,
    seq_len: int | None,
    tokenizer_from: str | None = None,
    objective: str = "lm",
    held_out: bool = False,
    seed: int = 0,
) -> Sequences:
    """Sequences from a SPEC.

    Args:
        spec: an int tensor [N, S]; ``input_ids`` int [N, S] and optional ``labels``, in a mapping or a
            ``.safetensors``; whatever :func:`gisp.data.read_rows` reads; or a ``.yaml`` that lists the tasks of a
            mixture (:mod:`gisp.data.mixture`).
        vocab_size: token ids must lie below it.
        seq_len: sequences are cut to this length; ``None`` = token rows as they are, text in rows of 256.
        tokenizer_from: model folder or name whose tokenizer reads text.
        objective: ``margin`` and ``choice`` need choices; ``lm`` and ``completion`` take their gold answer alone;
            ``completion`` needs something in front of what is scored. Tasks of a mixture may name their own.
        held_out: of a source with several splits, take its test or validation split instead of the training split.
        seed: of the order in which a mixture takes its tasks' examples; without effect on anything else.

    Raises:
        GispError: anything unreadable, empty, of the wrong type or out of range.
    """
    if isinstance(spec, torch.Tensor):
        where = "the token tensor"
        sequences = from_tokens(spec, None, where, vocab_size, seq_len)
    elif isinstance(spec, Mapping):
        where = "the mapping of token tensors"
        sequences = from_token_tensors(spec, where, vocab_size, seq_len)
    elif not isinstance(spec, (str, Path)):
        raise GispError(
            f"data is a {type(spec).__name__}: give an int tensor [sequences, tokens], a mapping with input_ids and "
            "labels, a path or a name"
        )
    elif Path(spec).suffix in MIXTURE_FILES:
        load = partial(load_sequences, vocab_size=vocab_size, tokenizer_from=tokenizer_from, held_out=held_out)
        return _mixture(read_mixture(Path(spec), objective), load, seq_len, seed)
    elif (where := str(spec)).endswith(".safetensors"):
        sequences = from_token_file(Path(spec), vocab_size, seq_len)
    else:
        sequences = _from_rows(where, tokenizer_from, seq_len or DEFAULT_SEQ_LEN, objective, vocab_size, held_out)
    if objective in CHOOSING and len(set(sequences.signs)) != 2:
        raise GispError(f"{where}: --objective {objective} needs rows of context, choices and answer")
    # Token rows whose labels leave nothing out are plain text.
    if objective == "completion" and not any(bool((labels == IGNORED).any()) for _, labels in sequences.rows):
        raise GispError(f"{where} scores every token: --objective completion needs labels of {IGNORED} for the prompt")
    return replace(sequences, compared=True) if objective == "choice" else sequences


def _mixture(entries: list[Entry], load: Callable[..., Sequences], seq_len: int | None, seed: int) -> Sequences:
    total = sum(entry.weight for entry in entries)
    tasks = []
    for number, entry in enumerate(entries):
        sequences = load(entry.data, seq_len=entry.seq_len or seq_len, objective=entry.objective)
        taken = entry.sample(sequences, number, seed)
        tasks.append((Task(entry.data, entry.objective, entry.weight / total, len(taken.examples)), taken))
    return Sequences.mixture(tasks)


def _from_rows(
    spec: str, tokenizer_from: str | None, seq_len: int, objective: str, vocab_size: int, held_out: bool
) -> Sequences:
    rows = list(read_rows(spec, held_out))
    kind = kind_of_rows(rows, spec)
    if objective == "completion" and kind == "text":
        raise GispError(f"{spec} is plain text: --objective completion needs prompts and completions, or choices")
    if objective in CHOOSING and kind != "choices":
        raise GispError(f"{spec}: --objective {objective} needs rows of context, choices and answer")
    if objective in CHOOSING and not any(len(row["choices"]) > 1 for row in rows):
        raise GispError(f"{spec}: --objective {objective} compares choices, and no row has two: give wrong ones too")
    tokenizer = load_tokenizer(tokenizer_from, spec)
    if kind == "text" and is_document(spec):
        kind = "document"
    entry = cache_entry(rows, kind, tokenizer, seq_len, objective)
    sequences = read_entry(entry)
    if sequences is None:
        with task(f"tokenising {Path(spec).name}"):
            sequences = tokenise(rows, kind, PairEncoder(tokenizer), seq_len, objective, spec)
        write_entry(entry, sequences)
    check_vocabulary(max(int(ids.max()) for ids, _ in sequences.rows), vocab_size, spec)
    kinds = [name for row in rows if isinstance(name := row.get("task"), str)]
    # Rows of text are joined, others are an example each.
    named = kind not in ("text", "document") and len(kinds) == len(rows)
    return replace(sequences, kinds=tuple(kinds)) if named else sequences
