"""From evaluation data to what is measured on a model: the rows decide."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from gisp.data import Sequences, load_sequences, read_rows
from gisp.data.encode import load_tokenizer
from gisp.errors import GispError
from gisp.evaluate.batches import vocabulary
from gisp.evaluate.choices import ChoiceAccuracy, read_question
from gisp.evaluate.completions import CompletionPerplexity, ExactMatch, read_completion
from gisp.evaluate.pairs import RequestEncoder
from gisp.evaluate.perplexity import check_stride, perplexity
from gisp.model.checks import warn_beyond_positions

DEFAULT_WINDOW = 128
_DEFAULT_MAX_LENGTH = 2048
# Rows of text come as one stream where windows overlap.
_WHOLE = 2**40

Measure = Callable[[Any], dict[str, Any]]
"""Figures of a model, ``perplexity``, ``tokens`` and ``window`` among them."""


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    Attributes:
        window: longest input in tokens; ``None`` = 128 for text and tokens, the model's own limit for choices and
            completions.
        stride: see :func:`gisp.evaluate.perplexity.perplexity`; text and tokens only.
        limit: rows (sequences) used, the first ones; ``None`` = all.
        batch_size: sequences per forward pass, fewer where their logits are too many; ``None`` = by their tokens.
        generate: also measure exact match on completions.
        until, max_new_tokens, extract: see :class:`gisp.evaluate.completions.ExactMatch`.
    """

    window: int | None = None
    stride: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    generate: bool = False
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    extract: str | None = None

    def __post_init__(self) -> None:
        check_stride(DEFAULT_WINDOW if self.window is None else self.window, self.stride)
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GispError(f"--{name.replace('_', '-')} is {value}: give at least 1")
        if not self.generate and (self.until or self.extract is not None):
            raise GispError(f"{'--until' if self.until else '--extract'} belongs to --generate: add it")
        if "" in self.until:
            raise GispError("--until is empty: give the text that ends an answer")
        self.pattern()

    def pattern(self) -> re.Pattern[str] | None:
        """``extract`` compiled."""
        try:
            return None if self.extract is None else re.compile(self.extract)
        except re.error as error:
            raise GispError(f"--extract {self.extract!r} is no regular expression: {error}") from None


def prepare(data: str, options: EvalOptions, model: Any, tokenizer_from: str | None) -> Measure:
    """What to measure on ``data``, read and tokenised once for any number of prunings of one model.

    Rows of choices give accuracy, of prompts and completions the completions' perplexity (and exact match), anything
    else perplexity.

    Args:
        model: gives the vocabulary and the longest input.
        tokenizer_from: model folder or name whose tokenizer reads text.

    Raises:
        GispError: data that cannot be read, malformed rows, options for other data.
    """
    vocab_size = vocabulary(model)
    first = None if data.endswith(".safetensors") else next(iter(read_rows(data, True)), None)
    kind = _kind(first or {})
    if options.generate and kind != "completion":
        raise GispError(f"--generate needs rows of prompt and completion, {data} has none: leave it out")
    if kind == "sequence":
        return _perplexity(data, options, vocab_size, tokenizer_from)
    if options.stride is not None:
        raise GispError(f"--stride is for text and tokens, {data} holds rows of {kind}s: leave it out")
    tokenizer = load_tokenizer(tokenizer_from, data)
    limit = max_length(model)
    encoder = RequestEncoder(tokenizer, min(limit, options.window or limit), vocab_size)
    numbered = enumerate(islice(read_rows(data, True), options.limit))
    window, batch_size = encoder.max_length, options.batch_size
    if kind == "choice":
        questions = [read_question(row, encoder, f"{data}: row {i}") for i, row in numbered]
        return ChoiceAccuracy(questions, window, batch_size)
    pattern = options.pattern()
    completions = [read_completion(row, encoder, f"{data}: row {i}", pattern) for i, row in numbered]
    likelihood = CompletionPerplexity(completions, window, batch_size)
    if not options.generate:
        return likelihood
    match = ExactMatch(
        completions,
        tokenizer,
        window=window,
        until=options.until,
        max_new_tokens=options.max_new_tokens,
        extract=pattern,
        batch_size=batch_size,
    )
    return lambda pruned: {**likelihood(pruned), **match(pruned)}


def _kind(row: dict[str, Any]) -> str:
    if "choices" in row or "contexts" in row:
        return "choice"
    return "completion" if "prompt" in row and "completion" in row else "sequence"


def _perplexity(data: str, options: EvalOptions, vocab_size: int, tokenizer_from: str | None) -> Measure:
    window = options.window or DEFAULT_WINDOW
    stride = check_stride(window, options.stride)
    text_length = window if stride == window else _WHOLE
    sequences: Sequences = load_sequences(
        data,
        vocab_size=vocab_size,
        seq_len=None if data.endswith(".safetensors") else text_length,
        tokenizer_from=tokenizer_from,
        held_out=True,
    ).first(options.limit)

    def measure(model: Any) -> dict[str, Any]:
        warn_beyond_positions(model.config, min(window, max(len(ids) for ids, _ in sequences.rows)))
        found = perplexity(model, sequences, window, stride, batch_size=options.batch_size)
        return {**asdict(found), "stride": stride}

    return measure


def max_length(model: Any) -> int:
    """Longest input of a model, from its configuration."""
    config = model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return _DEFAULT_MAX_LENGTH
