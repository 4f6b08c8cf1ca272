"""Text as tokens: one encoder for calibration and evaluation, equal to lm-eval's to the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gisp.errors import GispError
from gisp.hub import hub_options, unreachable
from gisp.model.gguf import pretrained


def load_tokenizer(tokenizer_from: str | None, spec: str) -> Any:
    """The tokenizer beside a model; text cannot be read without one.

    Raises:
        GispError: there is none, or none without code of its own.
    """
    from transformers import AutoTokenizer

    if tokenizer_from is None:
        raise GispError(f"{spec} is text and no tokenizer is known: give token ids or a model with a tokenizer")
    limits = hub_options(tokenizer_from)
    try:
        folder, options = pretrained(tokenizer_from)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options, **limits)
    except Exception as error:  # tokenizers raise many types for a missing or broken file
        if limits and isinstance(error, OSError):
            raise GispError(unreachable(f"{spec} is text and the tokenizer of {tokenizer_from}")) from None
        reason = " ".join(str(error).split())[:200]
        raise GispError(f"{spec} is text and {tokenizer_from} has no usable tokenizer: {reason}") from None


@dataclass(frozen=True)
class Pair:
    """Token ids of a context, at least one, and of what follows it and is scored, at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class PairEncoder:
    """Tokens of texts, of contexts with their continuations and of conversations.

    Texts and pairs have the tokens that ``HFLM`` of lm-eval 0.4.13 gives them (``tok_encode``, ``_encode_pair``,
    ``loglikelihood``):

    - Special tokens: a text has those the tokenizer adds by itself (a BOS where it adds one), but none where the text
      already begins with the BOS token's own text, as rendered chat templates often do.
    - The seam: context and continuation are one text, nothing is put between them. Whitespace at the end of the context
      moves to the continuation; the continuation's tokens are those of the whole text behind as many as the context has
      alone.
    - An empty context is the BOS token, or the end-of-text token of a tokenizer without one.

    A conversation is the text that the tokenizer's chat template makes of it; its last turn is a continuation.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        start = tokenizer.bos_token_id
        self._start: int | None = tokenizer.eos_token_id if start is None else start
        self._start_text = None if self._start is None else tokenizer.decode(self._start)

    def text(self, text: str) -> list[int]:
        """Tokens of a text that begins a sequence."""
        special = self._start_text is None or not text.startswith(self._start_text)
        return self._encode(text, special)

    def inside(self, text: str) -> list[int]:
        """Tokens of a text that stands in the middle of a sequence: without special tokens."""
        return self._encode(text, False)

    def prompt(self, text: str, where: str) -> list[int]:
        """Tokens of a text that is to be continued, at least one.

        Raises:
            GispError: an empty text, and the tokenizer knows no special token to begin with.
        """
        ids = self.text(text) or ([] if self._start is None else [self._start])
        if not ids:
            raise GispError(f"{where}: the prompt is empty: give text")
        return ids

    def pair(self, context: str, continuation: str, where: str) -> Pair:
        """A context and its continuation.

        Args:
            where: names the row in errors.

        Raises:
            GispError: either has no token.
        """
        head: list[int] = []
        tail = continuation
        if context:
            bare = context.rstrip()
            head, tail = self.text(bare), context[len(bare) :] + continuation
            ids = self.text(bare + tail)[len(head) :]
        if not head:
            ids = self.inside(tail)
            if self._start is None or ids[:1] == [self._start]:
                head, ids = ids[:1], ids[1:]
            else:
                head = [self._start]
        if not head or not ids:
            raise GispError(
                f"{where}: {continuation[:40]!r} adds no token to its context (empty prompt or completion, or merged "
                "with its end): give longer text"
            )
        return Pair(tuple(head), tuple(ids))

    def conversation(self, messages: list[dict[str, str]], where: str) -> str:
        """All turns as one text.

        Raises:
            GispError: no chat template, or one that refuses the conversation.
        """
        return self._render(messages, where, False)

    def last_turn(self, messages: list[dict[str, str]], where: str) -> tuple[str, str]:
        """What stands before the last assistant turn, and that turn to the end of the conversation.

        The mark that opens the turn belongs to the first, the mark that ends it to the second.

        Raises:
            GispError: as :meth:`conversation`, or the last message is no assistant's, or the template does not put it
                behind the others.
        """
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise GispError(f"{where}: a conversation does not end with an assistant's answer: {_shown(messages)}")
        whole = self._render(messages, where, False)
        for opened in (True, False):
            before = self._render(messages[:-1], where, opened)
            if before and whole.startswith(before) and len(whole) > len(before):
                return before, whole[len(before) :]
        raise GispError(
            f"{where}: the chat template does not render the last turn behind the others: give prompt and completion "
            f"({_shown(messages)})"
        )

    def choices(self, row: dict[str, Any], where: str) -> list[tuple[str, str]]:
        """Context and continuation of every choice of a checked row, see :func:`gisp.data.read_rows`.

        ``contexts`` take the ``continuation`` they share, or the ``choices`` one by one; ``messages`` without a
        ``context`` are answered by the choices.

        Raises:
            GispError: a conversation the tokenizer cannot render.
        """
        contexts, shared = row.get("contexts"), row.get("continuation")
        if contexts is not None and shared is not None:
            return [(context, shared) for context in contexts]
        tails = [str(choice) for choice in row["choices"]]
        if contexts is None and isinstance(row.get("context"), str):
            contexts = [row["context"]] * len(tails)
        if contexts is not None:
            return list(zip(contexts, tails, strict=True))
        turns = ([*row["messages"], {"role": "assistant", "content": tail}] for tail in tails)
        return [self.last_turn(messages, where) for messages in turns]

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def _render(self, messages: list[dict[str, str]], where: str, opened: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise GispError(
                f"{where} holds messages and the tokenizer has no chat template: give prompt and completion"
            )
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened))
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())[:200]
            raise GispError(
                f"{where}: the chat template refuses a conversation: {reason} ({_shown(messages)})"
            ) from None


def check_vocabulary(highest: int, vocab_size: int, where: str) -> None:
    """Require token ids that the model knows.

    Raises:
        GispError: the tokenizer is another model's.
    """
    if highest >= vocab_size:
        raise GispError(f"{where}: the tokenizer gives token {highest}, the model's vocabulary is {vocab_size}")


def _shown(messages: list[dict[str, str]]) -> str:
    return f"{messages[-1]['role']}: {messages[-1]['content'][:40]!r}"
