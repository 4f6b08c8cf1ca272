"""Generation with a key/value cache on models pruned in place: every way of sharing heads, layers without heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eval_cases import LAYERS, byte_tokenizer, greedy, shrunken
from tiny import tiny_tokens
from transformers import GenerationConfig

from gisp.evaluate.generation import generate_greedily
from gisp.model.shrink import ShrinkableModel

NEW = 10


@pytest.mark.parametrize("empty_layer", [None, 0, 2, LAYERS - 1])
@pytest.mark.parametrize("gqa", [None, "query", "balanced", "group"])
def test_greedy_with_a_cache_is_greedy_without(gqa: str | None, empty_layer: int | None) -> None:
    model, ids = shrunken(gqa, empty_layer=empty_layer), tiny_tokens(3, 7, seed=4)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    for cache in ({}, {"cache_implementation": "static"}):
        found = model.generate(ids, use_cache=True, **cache, **options)
        assert torch.equal(found, model.generate(ids, use_cache=False, **options))
    model.generation_config.eos_token_id = None
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for row, prompt in zip(found[:, 7:].tolist(), ids.tolist(), strict=True):
        assert row == greedy(model, prompt, NEW)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_prompts_of_different_lengths_in_one_batch(family: str) -> None:
    for empty_layer in (None, 0):
        model = shrunken("query", empty_layer=empty_layer, family=family)
        model.generation_config.eos_token_id = None
        tokenizer = byte_tokenizer()
        prompts = [tiny_tokens(1, length, seed=length)[0].tolist() for length in (3, 11, 6)]
        found = generate_greedily(model, tokenizer, prompts, max_new_tokens=NEW)
        for text, prompt in zip(found, prompts, strict=True):
            tokens = greedy(model, prompt, NEW)
            whole = tokens[: tokens.index(0)] if 0 in tokens else tokens
            assert text == tokenizer.decode(whole, skip_special_tokens=True)


def test_a_model_moved_back_generates_as_before() -> None:
    model, ids = shrunken("query", empty_layer=0), tiny_tokens(2, 5)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    pruned = model.generate(ids, **options)
    shrinkable = ShrinkableModel.of(model)
    assert shrinkable is not None
    removal = shrinkable.history[0]
    shrinkable.rollback()
    dense = model.generate(ids, **options)
    assert dense[0, 5:].tolist() == greedy(model, ids[0].tolist(), NEW)
    shrinkable.remove(removal)
    assert torch.equal(model.generate(ids, **options), pruned)
    assert not torch.equal(dense, pruned)


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": NEW, "bad_words_ids": [[40]]}],
)
def test_settings_of_a_model_do_not_bend_its_answers(settings: dict[str, Any]) -> None:
    model, tokenizer = shrunken("query"), byte_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=None, **settings)
    prompts = [tiny_tokens(1, length, seed=length)[0].tolist() for length in (3, 11, 6)]
    wanted = [greedy(model, prompt, NEW) for prompt in prompts]
    assert any(len(set(tokens)) < NEW for tokens in wanted), "nothing is repeated: no penalty would show"
    found = generate_greedily(model, tokenizer, prompts, max_new_tokens=NEW)
    for text, tokens in zip(found, wanted, strict=True):
        assert text == tokenizer.decode(tokens[: tokens.index(0)] if 0 in tokens else tokens, skip_special_tokens=True)
    assert model.generation_config.to_dict().items() >= settings.items()
