"""Random decoders, prunings and an independent masked model for the export tests."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
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

from gisp.export.formats.uniform import export_uniform, uniform_spec
from gisp.export.spec import ExportReport, LayerRanking, PrunedSpec
from gisp.model.keep import Keep

HEADS, CHANNELS, VOCAB = 8, 48, 128
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 8}),
    "llama-gqa": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama-bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 6}),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
}
FAMILIES = tuple(_FAMILIES)


class Kept(NamedTuple):
    """What one layer keeps."""

    heads: tuple[int, ...]
    channels: tuple[int, ...]


KEPT = (
    Kept(heads=(0, 1, 2, 5), channels=tuple(range(0, 48, 2))),
    Kept(heads=(), channels=(3, 4, 9, 40)),
    Kept(heads=(4, 6, 7), channels=()),
    Kept(heads=tuple(range(8)), channels=tuple(range(5, 48))),
)
RUN = {
    "base_model": {"path": "some-org/some-model", "fingerprint": "f" * 64},
    "config": {"preset": "paper"},
    "versions": {"torch": "2.9.0"},
}


def dense(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Four layers, hidden size 64, 8 query heads on 2 key/value heads unless family or ``overrides`` say otherwise."""
    config_class, model_class, options = _FAMILIES[family]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": CHANNELS,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(3)
    model = model_class(config_class(**{**sizes, **options, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def dense_rounded(family: str) -> Any:
    """The float32 model whose weights are those of the bfloat16 one."""
    model = dense(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def layers_of(spec: PrunedSpec) -> tuple[Kept, ...]:
    return tuple(Kept(*layer) for layer in spec.keep.layers)


def spec_of(layers: tuple[Kept, ...] = KEPT) -> PrunedSpec:
    return PrunedSpec(keep=Keep(*zip(*layers, strict=True)), sparsity=0.5, model_sparsity=0.4, step=17, run=RUN)


def ranked(spec: PrunedSpec, seed: int = 0, channels: int = CHANNELS) -> PrunedSpec:
    """The spec with a random order of structures in which those it keeps come first."""
    generator = torch.Generator().manual_seed(seed)

    def order(kept: tuple[int, ...], count: int) -> tuple[int, ...]:
        shuffled = torch.randperm(count, generator=generator).tolist()
        return tuple(sorted(shuffled, key=lambda index: index not in kept))

    ranking = tuple(LayerRanking(order(heads, HEADS), order(kept, channels)) for heads, kept in spec.keep.layers)
    return replace(spec, ranking=ranking)


def export_one_size(base: Any, spec: PrunedSpec, out: Path, **options: Any) -> ExportReport:
    """A uniform export of any spec."""
    return export_uniform(base, uniform_spec(base, ranked(spec)), out, **options)


def masked(model: Any, keep: Keep) -> Any:
    """A copy of the model in which the activations of removed structures are multiplied by zero."""
    model = deepcopy(model)
    head_dim = model.model.layers[0].self_attn.head_dim
    for layer, (heads, channels) in zip(model.model.layers, keep.layers, strict=True):
        _mask_input(layer.self_attn.o_proj, heads, head_dim)
        _mask_input(layer.mlp.down_proj, channels, 1)
    return model


def _mask_input(linear: nn.Linear, kept: tuple[int, ...], block: int) -> None:
    mask = torch.zeros(linear.in_features // block, dtype=linear.weight.dtype)
    for index in kept:
        mask[index] = 1
    linear.register_forward_pre_hook(lambda _, args: (args[0] * mask.repeat_interleave(block),))


def tokens(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


# Families llama.cpp can run, with what it takes to switch sliding windows off.
GGUF_FAMILIES: dict[str, dict[str, Any]] = {
    "llama-mha": {},
    "llama-gqa": {},
    "llama-bias": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
}
