"""Tiny random models for driver tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 96
_FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama-gqa": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2}),
    "llama-bias": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 16}),
}
FAMILIES = tuple(_FAMILIES)


def tiny_model(family: str = "llama-gqa", *, layers: int = 4, seed: int = 0, **overrides: Any) -> Any:
    """A float32 model with hidden size 32, 4 heads and 24 MLP channels whose scores are well spread."""
    config_class, model_class, shape = _FAMILIES[family]
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        **shape,
        **overrides,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**options)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_tokens(rows: int = 8, length: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
