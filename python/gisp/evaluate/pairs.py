"""Continuations as requests to a model, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gisp.data.encode import PairEncoder, check_vocabulary
from gisp.errors import GispError
from gisp.evaluate.batches import each_batch, length_batches, vocabulary
from gisp.evaluate.memory import batch_tokens, losses_bytes, scoring_bytes
from gisp.model.modes import evaluation_mode
from gisp.replicas.sharing import agree_on


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


class RequestEncoder(PairEncoder):
    """Pairs and prompts that a model can read, cut where lm-eval cuts them.

    Args:
        max_length: longest input; a longer context loses its first tokens.
        vocab_size: token ids must lie below it.
    """

    def __init__(self, tokenizer: Any, max_length: int, vocab_size: int) -> None:
        super().__init__(tokenizer)
        self.max_length = max_length
        self._vocab_size = vocab_size

    def request(self, context: str, continuation: str, where: str) -> Request:
        """A scored continuation.

        Args:
            where: names the example in errors.

        Raises:
            GispError: a continuation without tokens or longer than ``max_length``, or tokens of another vocabulary.
        """
        pair = self.pair(context, continuation, where)
        if len(pair.continuation) > self.max_length:
            raise GispError(
                f"{where}: {len(pair.continuation)} tokens of a continuation exceed the longest input, "
                f"{self.max_length}: give shorter ones or a larger --window"
            )
        whole = pair.context + pair.continuation
        check_vocabulary(max(whole), self._vocab_size, where)
        kept = whole[-(self.max_length + 1) :]
        return Request(kept[:-1], pair.continuation, len(kept) < len(whole))

    def prompt(self, text: str, where: str) -> list[int]:
        """As of the base class, in the model's vocabulary."""
        ids = super().prompt(text, where)
        check_vocabulary(max(ids), self._vocab_size, where)
        return ids


def log_likelihoods(model: nn.Module, requests: Sequence[Request], batch_size: int | None = None) -> list[float]:
    """Summed log-probability in nats of every continuation, in the order of ``requests``.

    Equal inputs run once, and no more logits are held than a batch's. Padding stands on the right, where a causal
    model's earlier positions do not see it. Log-softmax and sum are float32 and float64 whatever the model's dtype.

    Raises:
        GispError: a NaN.
    """
    agree_on("evaluation data", lambda: sha256(repr([(r.inputs, r.targets) for r in requests]).encode()).hexdigest())
    device = next(model.parameters()).device
    numbers = _by_inputs(requests)
    inputs = list(numbers)

    def scored(batch: list[int]) -> list[tuple[int, float]]:
        rows = [torch.tensor(inputs[i]) for i in batch]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        logits = model(input_ids=padded, use_cache=False).logits
        asked = [(row, number) for row, i in enumerate(batch) for number in numbers[inputs[i]]]
        sums = []
        for row, number in asked:
            targets = torch.tensor(requests[number].targets, device=device)
            end = len(requests[number].inputs)
            behind = logits[row, end - len(targets) : end]
            # All logarithms have no name: they are gone before the next ones are there.
            found = functional.log_softmax(behind.float(), dim=-1).gather(1, targets[:, None])
            sums.append(found.double().sum())
        return [(number, value) for (_, number), value in zip(asked, torch.stack(sums).tolist(), strict=True)]

    batches = length_batches([len(ids) for ids in inputs], device, batch_size, vocabulary(model))
    with evaluation_mode(model), torch.no_grad():
        of_batches = each_batch("evaluating", batches, scored)
    of_requests = {number: value for batch in of_batches for number, value in batch}
    found = [of_requests[number] for number in range(len(requests))]
    if any(value != value for value in found):
        raise GispError("a log-probability on the evaluation data is NaN: check the weights, or use --dtype float32")
    return found


def likelihood_bytes(
    model: nn.Module, requests: Sequence[Request], device: torch.device, batch_size: int | None = None
) -> int:
    """Memory that :func:`log_likelihoods` of such a model takes of a device beside the weights, at most."""
    inputs = list(_by_inputs(requests))
    batches = length_batches([len(ids) for ids in inputs], device, batch_size, vocabulary(model))
    tokens = max((batch_tokens([len(inputs[i]) for i in batch]) for batch in batches), default=0)
    # Losses are those of one continuation at a time.
    longest = max((len(request.targets) for request in requests), default=0)
    return scoring_bytes(model, tokens, losses_bytes(model, longest))


def _by_inputs(requests: Sequence[Request]) -> dict[tuple[int, ...], list[int]]:
    """Numbers of the requests that have the same inputs."""
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        numbers.setdefault(request.inputs, []).append(number)
    return numbers
