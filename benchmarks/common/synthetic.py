"""Models of real shape with random weights, made on the device: honest for time and memory, not for quality."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.registry import Model


def llama_settings(model: Model) -> dict[str, Any]:
    """A Llama config's values for a shape."""
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "intermediate_size": model.channels,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": model.tied,
        "attn_implementation": "sdpa",
    }


def build_model(model: Model, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A Llama model whose parameters were never anywhere but on ``device``.

    Weights are normal with standard deviation 0.02: the loss is finite and near that of a uniform guess.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return built(LlamaForCausalLM, LlamaConfig(**llama_settings(model), use_cache=False), device, dtype, seed)


def built(
    kind: Callable[[Any], torch.nn.Module], config: Any, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Any:
    """A model of a config with random weights made on ``device``, in evaluation mode."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def build_outline(model: Model, dtype: torch.dtype) -> Any:
    """The same model without memory for its weights, which :func:`fill_weight` gives them wherever they will lie."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**llama_settings(model), use_cache=False)
    outline: Any = built(LlamaForCausalLM, config, torch.device("meta"), dtype)
    # Its tables are computed when it is made.
    outline.model.rotary_emb = type(outline.model.rotary_emb)(config)
    return outline


def fill_weight(device: torch.device, name: str, memory: torch.Tensor) -> None:
    """Random values of the weight of a name, the same wherever it lies; they are drawn on ``device``."""
    if name.endswith("norm.weight"):
        memory.fill_(1)
        return
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    for rows in memory.split(4096):
        rows.copy_(0.02 * torch.randn(rows.shape, generator=generator, device=device, dtype=memory.dtype))


def build_filled(model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    """The outline with its weights on ``device``."""
    outline = build_outline(model, dtype)
    tables, outline.model.rotary_emb = outline.model.rotary_emb, None
    outline.to_empty(device=device)
    outline.model.rotary_emb = tables.to(device)
    with torch.no_grad():
        for name, parameter in outline.named_parameters():
            fill_weight(device, name, parameter)
    return outline


def random_tokens(model: Model, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 [rows, length] on the CPU."""
    return torch.randint(0, model.vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
