"""Tiny random decoders and token files, saved as ordinary folders and safetensors files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 128
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _sizes(**changes: object) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rope_parameters": dict(DEFAULT_ROPE),
    }
    return sizes | changes


def randomize(model: PreTrainedModel, seed: int, std: float) -> None:
    """Overwrite every parameter: matrices N(0, std), norms around 1, biases around 0.

    Each layer gets its own scale so that the scores of different layers interleave without being exchangeable.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            scale = std * (0.8 + 0.4 * torch.rand((), generator=generator))
            rows = 0.6 + 0.8 * torch.rand(parameter.shape[0], 1, generator=generator)
            parameter.data.copy_(noise * rows * scale)
        elif name.endswith("bias"):
            parameter.data.copy_(0.2 * noise)
        else:
            parameter.data.copy_(1.0 + 0.25 * noise)


def _save(path: Path, kind: type[PreTrainedModel], config: PretrainedConfig, seed: int, std: float) -> Path:
    model = kind(config).float()
    randomize(model, seed, std)
    model.save_pretrained(path)
    return path


def llama_mha(path: Path, seed: int = 1) -> Path:
    """Llama, one key/value head per query head, channel count not a multiple of 16."""
    return _save(path, LlamaForCausalLM, LlamaConfig(**_sizes()), seed, 0.15)


def llama_gqa(path: Path, seed: int = 2) -> Path:
    """Llama with 8 query and 2 key/value heads, 5 layers."""
    sizes = _sizes(num_key_value_heads=2, num_hidden_layers=5, intermediate_size=176)
    return _save(path, LlamaForCausalLM, LlamaConfig(**sizes), seed, 0.15)


def llama_bias(path: Path, seed: int = 3) -> Path:
    """Llama with a bias on every projection; one attention and one MLP matter little and get emptied."""
    sizes = _sizes(attention_bias=True, mlp_bias=True, intermediate_size=112, num_hidden_layers=5)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).float()
    randomize(model, seed, 0.15)
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(0.01)
    model.model.layers[2].mlp.down_proj.weight.data.mul_(0.01)
    model.save_pretrained(path)
    return path


def llama_deep(path: Path, seed: int = 4) -> Path:
    """Llama of 11 thin layers: int(0.1 * 11) = 1 layer is protected at the front."""
    sizes = _sizes(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=11,
        intermediate_size=44,
    )  # fmt: skip
    return _save(path, LlamaForCausalLM, LlamaConfig(**sizes), seed, 0.18)


def llama_ties(path: Path, seed: int = 5) -> Path:
    """Llama in which heads and channels of several layers are all zero, hence score exactly 0."""
    model = LlamaForCausalLM(LlamaConfig(**_sizes(intermediate_size=80))).float()
    randomize(model, seed, 0.15)
    for layer, head in ((2, 1), (0, 5), (1, 3), (0, 2)):
        attention = model.model.layers[layer].self_attn
        rows = slice(8 * head, 8 * head + 8)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(attention, name).weight.data[rows] = 0.0
        attention.o_proj.weight.data[:, rows] = 0.0
    for layer, channel in [(1, c) for c in range(7, 31)] + [(0, 3), (0, 60), (2, 11), (2, 12)]:
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj.weight.data[channel] = 0.0
        mlp.up_proj.weight.data[channel] = 0.0
        mlp.down_proj.weight.data[:, channel] = 0.0
    model.save_pretrained(path)
    return path


def mistral(path: Path, seed: int = 6) -> Path:
    """Mistral, 8/4 heads, attention window shorter than the test sequences."""
    sizes = _sizes(num_key_value_heads=4, sliding_window=12)
    return _save(path, MistralForCausalLM, MistralConfig(**sizes), seed, 0.15)


def qwen2(path: Path, seed: int = 7) -> Path:
    """Qwen2, 8/2 heads, q/k/v biases, input and output embeddings tied."""
    sizes = _sizes(num_key_value_heads=2, tie_word_embeddings=True)
    return _save(path, Qwen2ForCausalLM, Qwen2Config(**sizes), seed, 0.14)


def qwen3(path: Path, seed: int = 8) -> Path:
    """Qwen3, 8/2 heads of dimension 16 in a hidden size of 64, q/k norms."""
    sizes = _sizes(num_key_value_heads=2, head_dim=16)
    return _save(path, Qwen3ForCausalLM, Qwen3Config(**sizes), seed, 0.15)


def deepseek(path: Path, seed: int = 9) -> Path:
    """DeepSeek-R1-Distill shape: Llama layout, 8/4 heads, scaled rotary frequencies."""
    sizes = _sizes(num_key_value_heads=4, intermediate_size=176, rope_parameters=dict(LLAMA3_ROPE))
    return _save(path, LlamaForCausalLM, LlamaConfig(**sizes), seed, 0.15)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama-mha": llama_mha,
    "llama-gqa": llama_gqa,
    "llama-bias": llama_bias,
    "llama-deep": llama_deep,
    "llama-ties": llama_ties,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "deepseek": deepseek,
}


def gpt2(path: Path) -> Path:
    """A decoder whose layers have neither q/k/v/o projections nor a gated MLP."""
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def token_ids(rows: int = 12, length: int = 32, seed: int = 11) -> torch.Tensor:
    """Random token ids, int64 [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, length), generator=generator)


def partial_labels(input_ids: torch.Tensor, seed: int = 12) -> torch.Tensor:
    """Labels with a different share of -100 in every row; the last row keeps a single scored token."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = input_ids.shape
    share = torch.linspace(0.15, 0.95, rows)[:, None]
    keep = torch.rand(rows, length, generator=generator) < share
    keep[:, 7] = True
    keep[-1] = False
    keep[-1, 9] = True
    return torch.where(keep, input_ids, torch.full_like(input_ids, -100))


def save_tokens(path: Path, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Path:
    """Write a token file; ids are stored as int32, labels as int64."""
    tensors = {"input_ids": input_ids.to(torch.int32).contiguous()}
    if labels is not None:
        tensors["labels"] = labels.to(torch.int64).contiguous()
    save_file(tensors, path)
    return path
