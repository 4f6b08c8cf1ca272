"""Decoders whose layers differ in attention heads and MLP width (transformers >= 5.14).

The widths are read from the standard ``per_layer_config`` of the configuration: ``num_attention_heads``,
``num_key_value_heads`` and ``intermediate_size`` of every layer that differs from the global values. With
``output_bias`` o_proj and down_proj have biases, whatever the model's kind gives its other projections. This file needs
nothing but torch and transformers and travels with the weights.
"""

from __future__ import annotations

import copy
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


def layer_config(config: Any, layer: int) -> Any:
    """The configuration of one layer."""
    return config.per_layer_config[layer] if config.is_heterogeneous else config


def dense_config(config: Any, **fields: Any) -> Any:
    """A copy with the global values alone, as of the dense model; ``fields`` are set without validation."""
    dense = copy.copy(config)
    dense.__dict__.pop("_heterogeneity_spec", None)
    dense.__dict__.update(fields)
    return dense


def resized(linear: nn.Linear, rows: int | None = None, columns: int | None = None, bias: bool = False) -> nn.Linear:
    """A new layer with other sizes; it has a bias if the old one has, or if asked for."""
    return nn.Linear(
        linear.in_features if columns is None else columns,
        linear.out_features if rows is None else rows,
        bias=bias or linear.bias is not None,
        dtype=linear.weight.dtype,
        device=linear.weight.device,
    )


def resize_layer(layer: Any, sizes: Any, output_bias: bool) -> None:
    """Give a dense decoder layer, whatever its kind, the heads and channels that ``sizes`` says."""
    attention, mlp = layer.self_attn, layer.mlp
    heads, kv_heads, channels = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.intermediate_size
    queries, keys = heads * attention.head_dim, kv_heads * attention.head_dim
    attention.q_proj = resized(attention.q_proj, rows=queries)
    attention.k_proj = resized(attention.k_proj, rows=keys)
    attention.v_proj = resized(attention.v_proj, rows=keys)
    attention.o_proj = resized(attention.o_proj, columns=queries, bias=output_bias)
    mlp.gate_proj = resized(mlp.gate_proj, rows=channels)
    mlp.up_proj = resized(mlp.up_proj, rows=channels)
    mlp.down_proj = resized(mlp.down_proj, columns=channels, bias=output_bias)
    attention.num_key_value_groups = heads // kv_heads
    for module, name, value in (
        (attention, "num_heads", heads),
        (attention, "num_key_value_heads", kv_heads),
        (mlp, "intermediate_size", channels),
    ):
        if hasattr(module, name):
            setattr(module, name, value)


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

    def validate_rope(self: Any) -> None:
        """Position encodings are checked against the heads of the dense model: there is one head_dim for all layers."""
        super(PrunedConfigMixin, dense_config(self)).validate_rope()  # type: ignore[misc]


class PrunedModelMixin:
    """Saving that keeps a pruned model loadable: transformers copies this file, ``auto_map`` is made complete here."""

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        """Save as usual, with all entries of ``auto_map`` pointing at the file in the same folder."""
        self.config.auto_map = auto_map(self.config.model_type)
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


class PrunedDecoderMixin(PrunedModelMixin):
    """The decoder of the model's kind with its layers built one by one, each with its own sizes."""

    _auto_class: ClassVar[Any] = "AutoModel"
    layer_class: type

    # vLLM compares arguments with annotations when it builds a decoder, and fails on those that are strings.
    def __init__(self, config):  # type: ignore[no-untyped-def]
        # Everything but the layers is the stock decoder's. Its position encoding reads sizes of heads from the
        # configuration, also later on, and is to find those of the dense model.
        super().__init__(dense_config(config, num_hidden_layers=0))
        use_config(self, config)
        dense = dense_config(config)
        for index in range(config.num_hidden_layers):
            layer: Any = self.layer_class(dense, index)
            resize_layer(layer, layer_config(config, index), bool(getattr(config, "output_bias", False)))
            # The attention implementation must follow the model's.
            layer.self_attn.config = config
            self.layers.append(layer)
        self.rotary_emb.config = dense
        self.post_init()


class PrunedHeadMixin(PrunedModelMixin):
    """What the model's kind puts on a decoder, on a pruned decoder."""

    decoder: type

    def __init__(self: Any, config: Any) -> None:
        self.build(dense_config(config, num_hidden_layers=0))
        use_config(self, config)
        self.model = self.decoder(config)
        self.post_init()

    def build(self: Any, config: Any) -> None:
        """Everything but the decoder."""
        super().__init__(config)  # type: ignore[call-arg]


class PrunedCausalLMMixin(PrunedHeadMixin):
    """A language model on a pruned decoder."""

    _auto_class: ClassVar[Any] = "AutoModelForCausalLM"


class PrunedClassifierMixin(PrunedHeadMixin, GenericForSequenceClassification):
    """A sequence classifier on a pruned decoder; its ``score`` is new and to be trained."""

    _auto_class: ClassVar[Any] = "AutoModelForSequenceClassification"

    def build(self: Any, config: Any) -> None:
        """The score of every label."""
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)


def use_config(model: Any, config: Any) -> None:
    """Make ``config`` that of a model built from a copy of it."""
    config._attn_implementation_internal = model.config._attn_implementation_internal
    model.config = config


def pruned_classes(name: str, module: str, family: str, text: str = "") -> tuple[Any, Any, Any, Any]:
    """Configuration, decoder, language model and classifier of a model type, made from its classes in transformers.

    Args:
        name: the model type.
        module: of transformers.models with its classes.
        family: how their names begin.
        text: what the names of configuration and decoder have beside that.
    """
    modeling = import_module(f"transformers.models.{module}.modeling_{module}")
    plain_config, plain_model, layer_class = (
        getattr(modeling, family + suffix) for suffix in (f"{text}Config", f"{text}Model", "DecoderLayer")
    )

    def derive(suffix: str, *bases: type, **attributes: Any) -> Any:
        return type(f"Gisp{family}{suffix}", bases, {"__module__": __name__, **attributes})

    fields: dict[str, Any] = {"model_type": f"gisp_{name}"}
    if not hasattr(plain_config, "head_dim"):
        # Where it follows from the number of heads a dense model need not tell it.
        fields |= {"head_dim": None, "__annotations__": {"head_dim": int | None}}
    config = strict(derive("Config", PrunedConfigMixin, plain_config, **fields))
    decoder = derive("Model", PrunedDecoderMixin, plain_model, config_class=config, layer_class=layer_class)
    heads = {"config_class": config, "decoder": decoder}
    causal_lm = derive("ForCausalLM", PrunedCausalLMMixin, getattr(modeling, f"{family}ForCausalLM"), **heads)
    plain = getattr(modeling, f"{family}PreTrainedModel")
    return config, decoder, causal_lm, derive("ForSequenceClassification", PrunedClassifierMixin, plain, **heads)


AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
SUFFIXES = ("Config", "Model", "ForCausalLM", "ForSequenceClassification")
# By model type: the module of transformers, how its class names begin, and what configuration and decoder add.
FAMILIES = {
    "cohere": ("cohere", "Cohere"),
    "cohere2": ("cohere2", "Cohere2"),
    "ernie4_5": ("ernie4_5", "Ernie4_5"),
    "exaone4": ("exaone4", "Exaone4"),
    "gemma": ("gemma", "Gemma"),
    "gemma3_text": ("gemma3", "Gemma3", "Text"),
    "granite": ("granite", "Granite"),
    "helium": ("helium", "Helium"),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", "HunYuanDenseV1"),
    "hyperclovax": ("hyperclovax", "HyperCLOVAX"),
    "llama": ("llama", "Llama"),
    "ministral": ("ministral", "Ministral"),
    "ministral3": ("ministral3", "Ministral3"),
    "mistral": ("mistral", "Mistral"),
    "olmo": ("olmo", "Olmo"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
    "seed_oss": ("seed_oss", "SeedOss"),
    "smollm3": ("smollm3", "SmolLM3"),
    "stablelm": ("stablelm", "StableLm"),
}


def classes_of(model_type: str) -> tuple[Any, Any, Any, Any]:
    """Configuration, decoder, language model and classifier of a pruned model type, ``gisp_...``.

    Raises:
        KeyError: there is no such type.
    """
    return _made(model_type.removeprefix("gisp_"))


@cache
def _made(name: str) -> tuple[Any, Any, Any, Any]:
    # Once for each name: pickles find classes by name and refuse others of the same name.
    return pruned_classes(name, *FAMILIES[name])


def __getattr__(name: str) -> Any:
    """The classes by name, for ``auto_map`` and pickles; a family is imported when it is asked for."""
    for model_type, (_, family, *_) in FAMILIES.items():
        suffix = name.removeprefix(f"Gisp{family}")
        if suffix in SUFFIXES:
            return classes_of(model_type)[SUFFIXES.index(suffix)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def auto_map(model_type: str) -> dict[str, str]:
    """The ``auto_map`` of a model type; AutoModel is part of it because serving engines ask for it."""
    return {
        name: f"modeling_gisp.{item.__name__}" for name, item in zip(AUTO_CLASSES, classes_of(model_type), strict=True)
    }
