"""Generated answers compared as lm-eval 0.4.13 compares them: its regex filters and its exact match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gisp.evaluate.generation import generate_greedily
from gisp.evaluate.pairs import RequestEncoder

# What lm-eval's regex filter gives where it finds nothing.
_NOTHING = "[invalid]"


@dataclass(frozen=True)
class Filter:
    """What is taken of an answer: the match numbered ``group_select``, of it the first group that is not empty."""

    name: str
    regex_pattern: str
    group_select: int = 0

    def apply(self, answer: str) -> str:
        matches = re.findall(self.regex_pattern, answer)
        if not matches:
            return _NOTHING
        match = matches[self.group_select]
        if isinstance(match, tuple):
            match = next((group for group in match if group), _NOTHING)
        return str(match).strip()


@dataclass(frozen=True)
class Extraction:
    """How a task of lm-eval generates and compares.

    Attributes:
        until: texts that end an answer and do not belong to it.
        max_new_tokens: longest answer.
        filters: options of each :class:`Filter`; every one gives an accuracy of its own.
        ignored: patterns removed from both sides before they are compared.
        ignore_case: whether both sides are compared in lower case.
    """

    until: Sequence[str]
    max_new_tokens: int
    filters: Sequence[dict[str, Any]]
    ignored: Sequence[str] = field(default=())
    ignore_case: bool = False

    def plain(self, text: str) -> str:
        """A text as it is compared."""
        for pattern in self.ignored:
            text = re.sub(pattern, "", text)
        return text.lower() if self.ignore_case else text


class GeneratedAnswers:
    """Exact match of greedily generated answers.

    Args:
        rows: ``prompt`` and ``target``; a prompt too long for the model loses its first tokens, as in lm-eval.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], encoder: RequestEncoder, how: Extraction, name: str) -> None:
        room = encoder.max_length - how.max_new_tokens
        where = f"{name}: row "
        self._prompts = [encoder.prompt(row["prompt"], f"{where}{i}")[-room:] for i, row in enumerate(rows)]
        self._targets = [how.plain(row["target"]) for row in rows]
        self._filters = [Filter(**options) for options in how.filters]
        self._how, self._tokenizer = how, encoder.tokenizer

    def __call__(self, model: Any) -> dict[str, float]:
        """``acc``, that of the first filter, and ``exact_match,FILTER`` of every one."""
        answers = generate_greedily(
            model,
            self._tokenizer,
            self._prompts,
            until=self._how.until,
            max_new_tokens=self._how.max_new_tokens,
        )
        found: dict[str, float] = {}
        for each in self._filters:
            hits = [
                self._how.plain(each.apply(answer)) == target
                for answer, target in zip(answers, self._targets, strict=True)
            ]
            found[f"exact_match,{each.name}"] = sum(hits) / len(hits)
        return {"acc": found[f"exact_match,{self._filters[0].name}"], **found}
