"""Greedy generation in batches, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from gisp.evaluate.batches import each_batch, length_batches
from gisp.evaluate.memory import generating_bytes
from gisp.model.modes import evaluation_mode
from gisp.replicas.sharing import agree_on


class _Until(StoppingCriteria):
    """Ends a row as soon as its new text holds one of the given texts."""

    def __init__(self, tokenizer: Any, until: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._until, self._start = tokenizer, until, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        done = [any(end in text for end in self._until) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def generate_greedily(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    until: Sequence[str] = (),
    max_new_tokens: int,
    batch_size: int | None = None,
) -> list[str]:
    """The most likely token after the other until an end-of-text token, a text of ``until`` or ``max_new_tokens``.

    Of the model's generation settings only its end-of-text tokens count.

    Args:
        prompts: token ids of each prompt, at least one; shorter ones of a batch are padded on the left and masked.
        until: the answer ends before the first of these texts.

    Returns:
        The new text of every prompt, without special tokens.
    """
    agree_on("prompts", lambda: sha256(repr([list(prompt) for prompt in prompts]).encode()).hexdigest())
    device = next(model.parameters()).device
    ends = _end_tokens(model, tokenizer)
    pad = ends[0] if ends else 0
    options = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )

    def answered(batch: list[int]) -> list[tuple[int, str]]:
        longest = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), longest), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        stop = StoppingCriteriaList([_Until(tokenizer, until, longest)] if until else [])
        generate: Any = model.generate
        found = generate(
            ids.to(device), attention_mask=mask.to(device), generation_config=options, stopping_criteria=stop
        )
        texts = []
        for row, i in enumerate(batch):
            new = found[row, longest:].tolist()
            # What follows is padding, and a tokenizer need not know the model's end tokens as special.
            end = next((place for place, token in enumerate(new) if token in ends), len(new))
            texts.append((i, _before_first(tokenizer.decode(new[:end], skip_special_tokens=True), until)))
        return texts

    lengths = _lengths(prompts, max_new_tokens)
    with evaluation_mode(model), _no_settings(model), torch.no_grad():
        of_batches = each_batch("generating", length_batches(lengths, device, batch_size), answered)
    answers = {i: text for batch in of_batches for i, text in batch}
    return [answers[i] for i in range(len(prompts))]


def generation_bytes(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    device: torch.device,
    batch_size: int | None = None,
) -> int:
    """Memory that :func:`generate_greedily` takes of a device beside the weights, at most."""
    batches = length_batches(_lengths(prompts, max_new_tokens), device, batch_size)
    return max(
        (generating_bytes(model, len(batch), max(len(prompts[i]) for i in batch), max_new_tokens) for batch in batches),
        default=0,
    )


def _lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    return [len(prompt) + max_new_tokens for prompt in prompts]


@contextmanager
def _no_settings(model: Any) -> Iterator[None]:
    """Without the model's own generation settings: transformers fills in what a configuration leaves open.

    Chat models come with repetition penalties, under which the likeliest token is not the one that is taken.
    """
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


def _before_first(text: str, until: Sequence[str]) -> str:
    places = [place for place in (text.find(end) for end in until) if place >= 0]
    return text[: min(places)] if places else text


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """End-of-text tokens of the model's generation configuration and of its tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    return list(dict.fromkeys(end for end in (*ends, tokenizer.eos_token_id) if end is not None))
