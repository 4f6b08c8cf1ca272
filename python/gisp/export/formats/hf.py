"""Export of the pruned model as a Hugging Face folder with the pruned shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gisp.errors import GispError
from gisp.export.check import weight_dtype, write_checked
from gisp.export.folder import is_tied
from gisp.export.modeling_gisp import FAMILIES, auto_map, classes_of
from gisp.export.relayout import LaidOut, plan_layers, stored_state
from gisp.export.sizes.layout import ZEROED, AttentionLayout
from gisp.export.sizes.options import option_text
from gisp.export.spec import ExportReport, PrunedSpec, gisp_record, map_checked
from gisp.model.keep import Keep
from gisp.model.structures import ModelMap


def export_hf(
    base: Any,
    spec: PrunedSpec,
    out: Path,
    *,
    tokenizer_from: Path | None = None,
    align_heads: int = 1,
    min_heads: int = 1,
) -> ExportReport:
    """Write the pruned model as safetensors, a ``per_layer_config`` and the modeling file that reads it.

    The folder loads with ``AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`` where this package is
    not installed, and with ``gisp.load(out)`` where it is. Its logits are compared with the masked base model's first.

    Args:
        base, spec, out, tokenizer_from: as for :func:`gisp.export.check.write_checked`.
        align_heads: every layer's number of query heads is a multiple of it (tensor parallelism).
        min_heads: smallest number of query heads of a layer; missing ones are zeroed.

    Raises:
        GispError: unsupported model type, sizes beyond the dense model's, or an error of ``write_checked``.
    """
    model_map = map_checked(base, spec.keep)
    check_family(model_map)
    asked = {name: n for name, n in (("align_heads", align_heads), ("min_heads", min_heads)) if n != 1}
    for name, count in asked.items():
        if count > model_map.num_heads:
            most = f"a layer of the dense model has {model_map.num_heads} heads"
            raise GispError(f"{option_text({name: count})}: {most}, give at most that many")
    spec = replace(spec, options={**spec.options, **asked})
    layouts = plan_layers(model_map, spec.keep, align=align_heads, minimum=min_heads)
    config = pruned_config(base, model_map, spec, layouts)
    weights = pruned_state(base, model_map, spec.keep, layouts)
    return write_checked(base, model_map, spec, out, weights, config, tokenizer_from)


def check_family(model_map: ModelMap) -> None:
    """Refuse models whose pruned form is not known.

    Raises:
        GispError: unsupported model type.
    """
    if model_map.model_type not in FAMILIES:
        raise GispError(f"model type {model_map.model_type!r} cannot be exported: {', '.join(FAMILIES)} can")


def pruned_state(base: Any, model_map: ModelMap, keep: Keep, layouts: list[AttentionLayout]) -> LaidOut:
    """Weights of the exported model by name, in the dtype of the base and on its device."""
    stored = [
        {"heads": layout.query, "kv_heads": layout.kv, "channels": channels or (ZEROED,)}
        for layout, channels in zip(layouts, keep.channels, strict=True)
    ]
    return stored_state(base, model_map, stored)


def config_values(base: Any, model_map: ModelMap) -> dict[str, Any]:
    """What an exported model takes over from the base model's configuration."""
    own = ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path")
    values = {key: value for key, value in base.config.to_dict().items() if key not in own}
    return {
        **values,
        "head_dim": model_map.head_dim,
        "dtype": str(weight_dtype(base)).removeprefix("torch."),
        "tie_word_embeddings": is_tied(base),
    }


def pruned_config(base: Any, model_map: ModelMap, spec: PrunedSpec, layouts: list[AttentionLayout]) -> Any:
    """The base model's configuration with per-layer widths; global widths stay the dense ones."""
    model_type = f"gisp_{model_map.model_type}"
    config_class, _, causal_lm, _ = classes_of(model_type)
    values = {
        **config_values(base, model_map),
        "architectures": [causal_lm.__name__],
        "auto_map": auto_map(model_type),
        "gisp": gisp_record(base, spec),
        "per_layer_config": {
            layer: {
                "intermediate_size": max(len(channels), 1),
                "num_attention_heads": len(layout.query),
                "num_key_value_heads": len(layout.kv),
            }
            for layer, (channels, layout) in enumerate(zip(spec.keep.channels, layouts, strict=True))
        },
    }
    if adds_output_biases(base, model_map):
        values["output_bias"] = True
    return config_class(**values)


def adds_output_biases(base: Any, model_map: ModelMap) -> bool:
    """Whether o_proj and down_proj have biases that the base model's configuration does not speak of."""
    biased = model_map.layers[0].layer.mlp.down_proj.bias is not None
    return biased and not getattr(base.config, "mlp_bias", False)
