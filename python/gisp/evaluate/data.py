"""From evaluation data to what is measured on a model: the rows decide."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import torch

from gisp.config.evaluation import DEFAULT_WINDOW, EvalOptions, check_stride
from gisp.data import Sequences, load_sequences, read_rows
from gisp.data.encode import load_tokenizer
from gisp.errors import GispError
from gisp.evaluate.batches import vocabulary
from gisp.evaluate.choices import ChoiceAccuracy, read_question
from gisp.evaluate.completions import CompletionPerplexity, ExactMatch, read_completion
from gisp.evaluate.pairs import RequestEncoder
from gisp.evaluate.perplexity import perplexity, perplexity_bytes
from gisp.evaluate.staged_loss import StagedLoss
from gisp.model.checks import warn_beyond_positions

_DEFAULT_MAX_LENGTH = 2048
# Rows of text come as one stream where windows overlap.
_WHOLE = 2**40


class Measure(Protocol):
    """What is measured, ready for any number of prunings of one model."""

    def __call__(self, model: Any, /) -> dict[str, Any]:
        """Figures of a model."""

    def working(self, model: Any, device: torch.device, /) -> int:
        """Bytes it takes of a device at most, beside the weights of a model, which may be its shapes alone."""


@dataclass(frozen=True)
class Measures:
    """Several of them, one after the other."""

    parts: tuple[Measure, ...]

    def __call__(self, model: Any) -> dict[str, Any]:
        return {name: value for measure in self.parts for name, value in measure(model).items()}

    def working(self, model: Any, device: torch.device) -> int:
        """As of :class:`Measure`."""
        return max(measure.working(model, device) for measure in self.parts)


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexity of sequences; arguments as of :func:`gisp.evaluate.perplexity.perplexity`."""

    sequences: Sequences
    window: int
    stride: int
    batch_size: int | None
    parts: StagedLoss | None

    def __call__(self, model: Any) -> dict[str, Any]:
        sequences, window = self.sequences, self.window
        warn_beyond_positions(model.config, min(window, max(len(ids) for ids, _ in sequences.rows)))
        found = perplexity(model, sequences, window, self.stride, batch_size=self.batch_size, parts=self.parts)
        return {**asdict(found), "stride": self.stride}

    def working(self, model: Any, device: torch.device) -> int:
        """As of :class:`Measure`."""
        return perplexity_bytes(model, self.sequences, self.window, self.stride, device, self.batch_size)


def prepare(
    data: str, options: EvalOptions, model: Any, tokenizer_from: str | None, parts: StagedLoss | None = None
) -> Measure:
    """What to measure on ``data``, read and tokenised once for any number of prunings of one model.

    Rows of choices give accuracy, of prompts and completions the completions' perplexity (and exact match), anything
    else perplexity.

    Args:
        model: gives the vocabulary and the longest input; its weights are not read.
        tokenizer_from: model folder or name whose tokenizer reads text.
        parts: as of :func:`gisp.evaluate.perplexity.perplexity`.

    Raises:
        GispError: data that cannot be read, malformed rows, options for other data or for a model in one process.
    """
    vocab_size = vocabulary(model)
    first = None if data.endswith(".safetensors") else next(iter(read_rows(data, True)), None)
    kind = _kind(first or {})
    if options.generate and kind != "completion":
        raise GispError(f"--generate needs rows of prompt and completion, {data} has none: leave it out")
    if kind == "sequence":
        return _perplexity(data, options, vocab_size, tokenizer_from, "text" in (first or {}), parts)
    if parts is not None:
        raise GispError(f"--stages is for text and tokens, {data} holds rows of {kind}s: give --offload instead")
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
    return Measures((likelihood, match))


def _kind(row: dict[str, Any]) -> str:
    if "choices" in row or "contexts" in row:
        return "choice"
    return "completion" if "prompt" in row and "completion" in row else "sequence"


def _perplexity(
    data: str,
    options: EvalOptions,
    vocab_size: int,
    tokenizer_from: str | None,
    one_stream: bool,
    parts: StagedLoss | None,
) -> Measure:
    window = options.window or DEFAULT_WINDOW
    stride = check_stride(window, options.stride)
    text_length = window if stride == window else _WHOLE
    sequences: Sequences = load_sequences(
        data,
        vocab_size=vocab_size,
        seq_len=None if data.endswith(".safetensors") else text_length,
        tokenizer_from=tokenizer_from,
        held_out=True,
    )
    if options.limit is not None and one_stream and stride < window:
        # The text of the first windows without overlap: the same text with any stride.
        end = options.limit * window
        sequences = Sequences.plain([(ids[:end], labels[:end]) for ids, labels in sequences.rows])
    else:
        sequences = sequences.first(options.limit)
    return TextPerplexity(sequences, window, stride, options.batch_size, parts)


def max_length(model: Any) -> int:
    """Longest input of a model, from its configuration."""
    config = model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return _DEFAULT_MAX_LENGTH
