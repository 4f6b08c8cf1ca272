"""Plain torch oracles of the evaluation tests, a word tokenizer, and pruned models that differ in what they keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import VOCAB, tiny_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import channels_name, heads_name, map_model

LAYERS = 4
GQA = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}


def byte_tokenizer(*, start: bool = False) -> Any:
    """Single bytes and a few merges, also across the beginnings of words; token 0 ends text, every token is in use."""
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "Ã", "©"]
    alphabet = [letter for letter in alphabet if letter not in "{|}~^`@"]
    words = {"<end>": 0, **{letter: i for i, letter in enumerate(alphabet, 1)}}
    merges = [("Ġ", "a"), ("Ġ", "c"), ("a", "b"), ("Ġa", "b")]
    for left, right in merges:
        words[left + right] = len(words)
    assert len(words) == VOCAB
    inner = Tokenizer(BPE(words, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if start:
        from tokenizers.processors import TemplateProcessing

        inner.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    ends = {"bos_token": "<end>"} if start else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>", **ends)


def shrunken(gqa: str | None, *, empty_layer: int | None = None, family: str | None = None, seed: int = 0) -> Any:
    """A model pruned in place: ``gqa`` None has a key/value head per query head; a layer may lose all its heads."""
    family = family or ("llama-mha" if gqa is None else "llama-gqa")
    shape = {"max_position_embeddings": 48, **(GQA if gqa else {})}
    model = tiny_model(family, layers=LAYERS, seed=seed, **shape)
    if not gqa:
        heads: list[list[int]] = [[0, 3], [1], [2, 3], [0]]
    elif gqa == "group":
        heads = [[4, 5, 6, 7], [], [0, 1, 2, 3], [4, 5, 6, 7]]
    elif gqa == "balanced":
        heads = [[0, 5], [1, 2, 4, 7], [3, 4], [0, 1, 6, 7]]
    else:
        heads = [[0, 1, 2, 6], [1, 2, 4], [4, 5, 6, 7], [0]]
    if empty_layer is not None:
        heads[empty_layer] = list(range(model.config.num_attention_heads))
    removal = {heads_name(i): torch.tensor(gone) for i, gone in enumerate(heads) if gone}
    removal |= {channels_name(i): torch.arange(i, 24, 3) for i in range(LAYERS)}
    ShrinkableModel(map_model(model, gqa or "query")).remove(removal)
    return model


def log_probability(model: Any, context: Sequence[int], continuation: Sequence[int]) -> float:
    """Summed log-probability, one token after the other, each from all before it."""
    total, seen = 0.0, list(context)
    for token in continuation:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([seen]), use_cache=False).logits[0, -1].double()
        total += float(logits[token] - logits.logsumexp(0))
        seen.append(token)
    return total


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """The most likely continuation without a cache, padding or batch."""
    seen = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            seen.append(int(model(input_ids=torch.tensor([seen]), use_cache=False).logits[0, -1].argmax()))
    return seen[len(prompt) :]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
