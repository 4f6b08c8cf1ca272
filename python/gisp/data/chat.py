"""Conversations as text, by the tokenizer's own chat template."""

from __future__ import annotations

from typing import Any

from gisp.errors import GispError

Messages = list[dict[str, str]]


def conversation(tokenizer: Any, messages: Messages, spec: str) -> str:
    """All turns as one text."""
    return _render(tokenizer, messages, spec, False)


def last_turn(tokenizer: Any, messages: Messages, spec: str) -> tuple[str, str]:
    """(what stands before the last assistant turn, that turn to the end of the conversation).

    The mark that opens the turn belongs to the first, the mark that ends it to the second.

    Raises:
        GispError: the last message is no assistant's, or the template does not put it behind the others.
    """
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise GispError(f"{spec}: a conversation does not end with an assistant's answer: {_shown(messages)}")
    whole = _render(tokenizer, messages, spec, False)
    for opened in (True, False):
        before = _render(tokenizer, messages[:-1], spec, opened)
        if before and whole.startswith(before) and len(whole) > len(before):
            return before, whole[len(before) :]
    raise GispError(
        f"{spec}: the chat template does not render the last turn behind the others: give prompt and completion "
        f"({_shown(messages)})"
    )


def _render(tokenizer: Any, messages: Messages, spec: str, opened: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise GispError(f"{spec} holds messages and the tokenizer has no chat template: give prompt and completion")
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened))
    except Exception as error:  # templates raise what they like
        reason = " ".join(str(error).split())[:200]
        raise GispError(f"{spec}: the chat template refuses a conversation: {reason} ({_shown(messages)})") from None


def _shown(messages: Messages) -> str:
    return f"{messages[-1]['role']}: {messages[-1]['content'][:40]!r}"
