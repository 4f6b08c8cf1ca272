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
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3


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


def pruned_classes(family: str, modeling: Any) -> tuple[Any, Any, Any]:
    """Configuration, decoder and language model of a family, made from its classes in transformers.

    Args:
        family: how its class names begin there.
        modeling: the module of transformers with its layers.
    """

    def derive(suffix: str, mixin: type, **attributes: Any) -> Any:
        bases = (mixin, getattr(modeling, family + suffix))
        return type(f"Gisp{family}{suffix}", bases, {"__module__": __name__, **attributes})

    fields: dict[str, Any] = {"model_type": f"gisp_{family.lower()}"}
    if not hasattr(getattr(modeling, f"{family}Config"), "head_dim"):
        # Where it follows from the number of heads a dense model need not tell it.
        fields |= {"head_dim": None, "__annotations__": {"head_dim": int | None}}
    config = strict(derive("Config", PrunedConfigMixin, **fields))
    parts = tuple(getattr(modeling, family + part) for part in ("DecoderLayer", "RMSNorm", "RotaryEmbedding"))
    decoder = derive("Model", PrunedDecoderMixin, config_class=config, parts=parts)
    return config, decoder, derive("ForCausalLM", PrunedCausalLMMixin, config_class=config, decoder=decoder)


CLASSES = {
    "gisp_llama": pruned_classes("Llama", modeling_llama),
    "gisp_mistral": pruned_classes("Mistral", modeling_mistral),
    "gisp_qwen2": pruned_classes("Qwen2", modeling_qwen2),
    "gisp_qwen3": pruned_classes("Qwen3", modeling_qwen3),
}
# ``auto_map`` and pickles find the classes by name.
globals().update({item.__name__: item for classes in CLASSES.values() for item in classes})


def auto_map(model_type: str) -> dict[str, str]:
    """The ``auto_map`` of a model type; AutoModel is part of it because serving engines ask for it."""
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    return {name: f"modeling_gisp.{item.__name__}" for name, item in zip(names, CLASSES[model_type], strict=True)}
