"""Decoders whose layers differ in attention heads and MLP width (transformers >= 5.14).

The widths are read from the standard ``per_layer_config`` of the configuration: ``num_attention_heads``,
``num_key_value_heads`` and ``intermediate_size`` of every layer that differs from the global values. With
``output_bias`` o_proj and down_proj have biases, whatever the model's kind gives its other projections. This file needs
nothing but torch and transformers and travels with the weights.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding


def layer_config(config: Any, layer: int) -> Any:
    """The configuration of one layer."""
    return config.per_layer_config[layer] if config.is_heterogeneous else config


def with_bias(linear: nn.Linear) -> nn.Linear:
    """A layer of the same shape with a bias."""
    return nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)


class PrunedConfigMixin:
    """Checks what a pruned model must satisfy instead of what a dense one must."""

    _auto_class: ClassVar[Any] = "AutoConfig"

    def validate_architecture(self: Any) -> None:
        """Every layer's key/value heads must divide its query heads; head_dim no longer follows from their number."""
        for layer in range(self.num_hidden_layers):
            config = layer_config(self, layer)
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            if heads < 1 or kv_heads < 1 or heads % kv_heads or config.intermediate_size < 1:
                raise ValueError(
                    f"layer {layer} has {heads} query heads, {kv_heads} key/value heads and "
                    f"{config.intermediate_size} MLP channels"
                )


class PrunedModelMixin:
    """Saving that keeps a pruned model loadable: transformers copies this file, ``auto_map`` is made complete here."""

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        """Save as usual, with all three entries of ``auto_map`` pointing at the file in the same folder."""
        self.config.auto_map = auto_map(self.config.model_type)
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


class PrunedDecoderMixin(PrunedModelMixin):
    """Builds each decoder layer from its own configuration."""

    _auto_class: ClassVar[Any] = "AutoModel"
    parts: tuple[Any, Any, Any]

    # vLLM compares arguments with annotations when it builds a decoder, and fails on those that are strings.
    def __init__(self, config):  # type: ignore[no-untyped-def]
        PreTrainedModel.__init__(self, config)
        decoder_layer, norm, rotary_embedding = self.parts
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            decoder_layer(layer_config(config, layer), layer) for layer in range(config.num_hidden_layers)
        )
        for layer in self.layers:
            # A layer's configuration is a copy; the attention implementation must follow the model's.
            layer.self_attn.config = config
            if getattr(config, "output_bias", False):
                layer.self_attn.o_proj = with_bias(layer.self_attn.o_proj)
                layer.mlp.down_proj = with_bias(layer.mlp.down_proj)
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = rotary_embedding(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        self.post_init()


class PrunedCausalLMMixin(PrunedModelMixin):
    """A language model on a pruned decoder."""

    _auto_class: ClassVar[Any] = "AutoModelForCausalLM"
    decoder: type

    def __init__(self: Any, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.decoder(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@strict
class GispLlamaConfig(PrunedConfigMixin, LlamaConfig):
    model_type = "gisp_llama"


class GispLlamaModel(PrunedDecoderMixin, LlamaModel):
    config_class = GispLlamaConfig
    parts = (LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding)


class GispLlamaForCausalLM(PrunedCausalLMMixin, LlamaForCausalLM):
    config_class = GispLlamaConfig
    decoder = GispLlamaModel


@strict
class GispMistralConfig(PrunedConfigMixin, MistralConfig):
    model_type = "gisp_mistral"


class GispMistralModel(PrunedDecoderMixin, MistralModel):
    config_class = GispMistralConfig
    parts = (MistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding)


class GispMistralForCausalLM(PrunedCausalLMMixin, MistralForCausalLM):
    config_class = GispMistralConfig
    decoder = GispMistralModel


@strict
class GispQwen2Config(PrunedConfigMixin, Qwen2Config):
    model_type = "gisp_qwen2"

    head_dim: int | None = None


class GispQwen2Model(PrunedDecoderMixin, Qwen2Model):
    config_class = GispQwen2Config
    parts = (Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding)


class GispQwen2ForCausalLM(PrunedCausalLMMixin, Qwen2ForCausalLM):
    config_class = GispQwen2Config
    decoder = GispQwen2Model


@strict
class GispQwen3Config(PrunedConfigMixin, Qwen3Config):
    model_type = "gisp_qwen3"


class GispQwen3Model(PrunedDecoderMixin, Qwen3Model):
    config_class = GispQwen3Config
    parts = (Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding)


class GispQwen3ForCausalLM(PrunedCausalLMMixin, Qwen3ForCausalLM):
    config_class = GispQwen3Config
    decoder = GispQwen3Model


CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "gisp_llama": (GispLlamaConfig, GispLlamaModel, GispLlamaForCausalLM),
    "gisp_mistral": (GispMistralConfig, GispMistralModel, GispMistralForCausalLM),
    "gisp_qwen2": (GispQwen2Config, GispQwen2Model, GispQwen2ForCausalLM),
    "gisp_qwen3": (GispQwen3Config, GispQwen3Model, GispQwen3ForCausalLM),
}


def auto_map(model_type: str) -> dict[str, str]:
    """The ``auto_map`` of a model type; AutoModel is part of it because serving engines ask for it."""
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    return {name: f"modeling_gisp.{item.__name__}" for name, item in zip(names, CLASSES[model_type], strict=True)}
