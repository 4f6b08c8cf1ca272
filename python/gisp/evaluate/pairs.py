"""A context and its continuation as tokens, cut where lm-eval cuts them, and the continuation's log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gisp.data.chat import last_turn
from gisp.errors import GispError
from gisp.evaluate.batches import length_batches
from gisp.model.modes import evaluation_mode


@dataclass(frozen=True)
class Request:
    """A continuation to be scored.

    Attributes:
        inputs: token ids the model reads: context and continuation without its last token.
        targets: token ids of the continuation; they are predicted at the last positions of ``inputs``.
        truncated: whether the context lost tokens at its start.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    truncated: bool


class PairEncoder:
    """Tokenises as ``HFLM`` of lm-eval 0.4.13 does (``tok_encode``, ``_encode_pair``, ``_loglikelihood_tokens``).

    Trailing spaces of the context move to the continuation; the continuation's tokens are those of the whole text
    behind as many as the context alone has; an empty context is the tokenizer's first special token.

    Args:
        max_length: longest input; a longer context loses its first tokens.
        vocab_size: token ids must lie below it.
    """

    def __init__(self, tokenizer: Any, max_length: int, vocab_size: int) -> None:
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        start = tokenizer.bos_token_id
        self._prefix: int | None = tokenizer.eos_token_id if start is None else start
        self._prefix_text = None if self._prefix is None else tokenizer.decode(self._prefix)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that begins a sequence."""
        special = not (self._prefix_text and text.startswith(self._prefix_text))
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def pair(self, context: str, continuation: str, where: str) -> Request:
        """A scored continuation.

        Args:
            where: names the example in errors.

        Raises:
            GispError: a continuation without tokens, or longer than ``max_length``.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if context:
            head = self.encode(context)
            tail = self.encode(context + continuation)[len(head) :]
        else:
            head, tail = [], list(self._tokenizer.encode(continuation, add_special_tokens=False))
            if self._prefix is None or tail[:1] == [self._prefix]:
                head, tail = tail[:1], tail[1:]
            else:
                head = [self._prefix]
        if not head or not tail:
            raise GispError(f"{where}: {continuation[:40]!r} adds no token to its context: give longer text")
        if len(tail) > self.max_length:
            raise GispError(
                f"{where}: {len(tail)} tokens of a continuation exceed the longest input, {self.max_length}: "
                "give shorter ones or a larger --window"
            )
        whole = self._checked(head + tail, where)
        kept = whole[-(self.max_length + 1) :]
        return Request(tuple(kept[:-1]), tuple(tail), len(kept) < len(whole))

    def turn(self, messages: list[dict[str, str]], answer: str, where: str) -> tuple[str, str]:
        """A conversation with an assistant's answer through the chat template: what stands before it, and the answer.

        Raises:
            GispError: a conversation the tokenizer cannot render.
        """
        return last_turn(self._tokenizer, [*messages, {"role": "assistant", "content": answer}], where)

    def prompt(self, text: str, where: str) -> tuple[int, ...]:
        """Tokens of a prompt that is to be continued, at least one.

        Raises:
            GispError: an empty prompt, and the tokenizer knows no special token to begin with.
        """
        ids = self.encode(text)
        if not ids and self._prefix is not None:
            ids = [self._prefix]
        if not ids:
            raise GispError(f"{where}: the prompt is empty: give text")
        return tuple(self._checked(ids, where))

    def _checked(self, ids: list[int], where: str) -> list[int]:
        if max(ids) >= self._vocab_size:
            raise GispError(
                f"{where}: the tokenizer gives token {max(ids)}, the model's vocabulary is {self._vocab_size}"
            )
        return ids


def log_likelihoods(model: nn.Module, requests: Sequence[Request], batch_size: int | None = None) -> list[float]:
    """Summed log-probability in nats of every continuation, in the order of ``requests``.

    Equal inputs run once. Padding stands on the right, where a causal model's earlier positions do not see it.
    Log-softmax and sum are float32 and float64 whatever the model's dtype.

    Raises:
        GispError: a NaN.
    """
    device = next(model.parameters()).device
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        numbers.setdefault(request.inputs, []).append(number)
    inputs = list(numbers)
    found = [0.0] * len(requests)
    with evaluation_mode(model), torch.no_grad():
        for batch in length_batches([len(ids) for ids in inputs], device, batch_size):
            rows = [torch.tensor(inputs[i]) for i in batch]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            logits = model(input_ids=padded, use_cache=False).logits
            asked = [(row, number) for row, i in enumerate(batch) for number in numbers[inputs[i]]]
            sums = []
            for row, number in asked:
                targets = torch.tensor(requests[number].targets, device=device)
                end = len(requests[number].inputs)
                scores = functional.log_softmax(logits[row, end - len(targets) : end].float(), dim=-1)
                sums.append(scores.gather(1, targets[:, None]).double().sum())
            for (_, number), value in zip(asked, torch.stack(sums).tolist(), strict=True):
                found[number] = value
    if any(value != value for value in found):
        raise GispError("a log-probability on the evaluation data is NaN: check the weights, or use --dtype float32")
    return found
