"""Models of real shape with random weights, made on the device: honest for time and memory, not for quality."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.common.registry import Model


def build_model(model: Model, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A Llama model whose parameters were never anywhere but on ``device``.

    Weights are normal with standard deviation 0.02: the loss is finite and near that of a uniform guess.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.channels,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    with default_dtype(dtype), torch.device(device):
        built = LlamaForCausalLM(config)
    return built.eval()


def random_tokens(model: Model, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 [rows, length] on the CPU."""
    return torch.randint(0, model.vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating-point tensors made meanwhile have ``dtype``; as before afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
