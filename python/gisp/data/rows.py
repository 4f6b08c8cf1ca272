"""Rows before they are tokens: dictionaries of one of four kinds, checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from gisp.errors import GispError, quoted

Kind = Literal["text", "document", "completion", "choices", "messages"]
FORMATS = "text, prompt and completion, context, choices and answer, or messages"
# What a row may hold that matters here; the rest (ids, sources, paths) changes nothing.
FIELDS = ("text", "prompt", "completion", "context", "contexts", "continuation", "choices", "answer", "messages")


def kind_of_rows(rows: Iterable[dict[str, Any]], spec: str) -> Kind:
    """The one kind all rows are of.

    Raises:
        GispError: no row, one of no known kind or with an answer that is none of its choices, rows of two kinds, or
            texts that are all empty.
    """
    kind: Kind | None = None
    blank = True
    for number, row in enumerate(rows):
        found = _kind(row, spec, number)
        if kind is not None and found != kind:
            raise GispError(f"{spec}: row {number} is not of the same kind as row 0 ({kind})")
        kind = found
        blank = blank and found == "text" and not row["text"].strip()
    if kind is None:
        raise GispError(f"{spec} holds no rows: give rows of {FORMATS}")
    if blank:
        raise GispError(f"{spec} holds no text: its rows are empty, give text")
    return kind


def _kind(row: dict[str, Any], spec: str, number: int) -> Kind:
    if isinstance(row.get("text"), str):
        return "text"
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return "completion"
    choices, messages = row.get("choices"), row.get("messages")
    if messages is not None:
        check_messages(messages, f"{spec}: row {number}")
    if isinstance(choices, list) and (
        isinstance(row.get("context"), str) or row.get("contexts") is not None or messages is not None
    ):
        _check_choices(row, spec, number)
        return "choices"
    if messages is not None:
        return "messages"
    for key in ("text", "prompt", "completion", "context"):
        if key in row and not isinstance(row[key], str):
            raise GispError(f"{spec}: row {number} has {key} {quoted(row[key])}: give a text")
    raise GispError(f"{spec}: row {number} has keys {', '.join(map(str, row)) or 'none'}: give {FORMATS}")


def _check_choices(row: dict[str, Any], spec: str, number: int) -> None:
    answer, choices, contexts = row.get("answer"), row["choices"], row.get("contexts")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise GispError(
            f"{spec}: row {number} has answer {quoted(answer)}: give the index of one of {len(choices)} choices"
        )
    if contexts is None:
        return
    if not isinstance(contexts, list) or len(contexts) != len(choices) or not all(isinstance(c, str) for c in contexts):
        raise GispError(f"{spec}: row {number} has contexts {quoted(contexts)}: give each choice a text")


def check_messages(messages: Any, where: str) -> None:
    """Require a conversation: a list of ``role`` and ``content``.

    Args:
        where: names the row in the error.
    """
    sound = isinstance(messages, list) and len(messages) > 0
    for message in messages if sound else ():
        keys = ("role", "content")
        sound = sound and isinstance(message, dict) and all(isinstance(message.get(key), str) for key in keys)
    if not sound:
        raise GispError(f"{where} has messages {quoted(messages)}: give a list of role and content")
