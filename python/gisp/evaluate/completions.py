"""Prompts with their completions: perplexity of the completion, and exact match of what is generated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from gisp.errors import GispError
from gisp.evaluate.choices import mean_with_error
from gisp.evaluate.generation import generate_greedily, generation_bytes
from gisp.evaluate.pairs import Request, RequestEncoder, likelihood_bytes, log_likelihoods
from gisp.evaluate.perplexity import from_total


@dataclass(frozen=True)
class Completion:
    """A prompt and the completion wanted.

    Attributes:
        request: the completion, to be scored.
        prompt: token ids of the prompt.
        wanted: what the compared part of an answer must be, stripped.
    """

    request: Request
    prompt: tuple[int, ...]
    wanted: str


class CompletionPerplexity:
    """Perplexity over all completion tokens."""

    def __init__(self, completions: Sequence[Completion], window: int, batch_size: int | None = None) -> None:
        self._requests = [completion.request for completion in completions]
        self._window = window
        self._batch_size = batch_size

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        total = -sum(log_likelihoods(model, self._requests, self._batch_size))
        found = from_total(total, sum(len(request.targets) for request in self._requests), self._window)
        return {
            **asdict(found),
            "examples": len(self._requests),
            "truncated": sum(request.truncated for request in self._requests),
        }

    def working(self, model: nn.Module, device: torch.device) -> int:
        """As of :class:`gisp.evaluate.data.Measure`."""
        return likelihood_bytes(model, self._requests, device, self._batch_size)


class ExactMatch:
    """Share of greedily generated answers equal to the completion after stripping, or in what ``extract`` finds.

    Args:
        until: texts that end an answer and do not belong to it.
        extract: its first match is compared, its first group where it has one; ``None`` compares whole answers.
    """

    def __init__(
        self,
        completions: Sequence[Completion],
        tokenizer: Any,
        *,
        window: int,
        until: Sequence[str] = (),
        max_new_tokens: int,
        extract: re.Pattern[str] | None = None,
        batch_size: int | None = None,
    ) -> None:
        room = window - max_new_tokens
        if room < 1:
            raise GispError(
                f"--max-new-tokens is {max_new_tokens}, prompt and answer have {window} tokens together: give less"
            )
        self._prompts = [completion.prompt[-room:] for completion in completions]
        self._cut = sum(len(completion.prompt) > room for completion in completions)
        self._wanted = [completion.wanted for completion in completions]
        self._tokenizer, self._until, self._extract = tokenizer, tuple(until), extract
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        answers = generate_greedily(
            model,
            self._tokenizer,
            self._prompts,
            until=self._until,
            max_new_tokens=self._max_new_tokens,
            batch_size=self._batch_size,
        )
        hits = [compared(a, self._extract) == w for a, w in zip(answers, self._wanted, strict=True)]
        return {**mean_with_error("exact_match", hits), "prompts_truncated": self._cut}

    def working(self, model: nn.Module, device: torch.device) -> int:
        """As of :class:`gisp.evaluate.data.Measure`."""
        return generation_bytes(model, self._prompts, self._max_new_tokens, device, self._batch_size)


def compared(text: str, extract: re.Pattern[str] | None) -> str | None:
    """The part of an answer that is compared; ``None`` where ``extract`` finds nothing."""
    if extract is None:
        return text.strip()
    match = extract.search(text)
    if match is None:
        return None
    part: str | None = match.group(1) if extract.groups else match.group()
    return None if part is None else part.strip()


def read_completion(
    row: dict[str, Any], encoder: RequestEncoder, where: str, extract: re.Pattern[str] | None = None
) -> Completion:
    """A row of ``prompt`` and ``completion``.

    Raises:
        GispError: a row of another form, or a completion in which ``extract`` finds nothing.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise GispError(
            f"{where} has the keys {', '.join(map(str, row)) or 'none'}: give prompt and completion as text"
        )
    wanted = compared(completion, extract)
    if wanted is None:
        raise GispError(f"{where}: --extract finds nothing in the completion {completion[-40:]!r}: change the pattern")
    return Completion(encoder.request(prompt, completion, where), tuple(encoder.prompt(prompt, where)), wanted)
