"""Export of the pruned model as a GGUF file for llama.cpp.

Layers of different widths are what llama.cpp's ``deci`` architecture is for: Llama blocks with a head count, a
key/value head count and an MLP width of every layer. Stored are the same heads and channels as in the ``hf`` export.
``deci`` has layers without heads or channels too, but llama.cpp (that of llama-cpp-python 0.3.36) drops the attention
of a layer without channels, ends the process when that is the last layer and cannot load a first layer without heads:
an emptied block keeps one zeroed head or channel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gisp.errors import GispError, quoted
from gisp.export.card import CardKind, write_card
from gisp.export.check import weight_dtype
from gisp.export.folder import new_folder
from gisp.export.formats.gguf.check import checked_gguf_report
from gisp.export.formats.gguf.file import DTYPES, require_gguf, write_gguf
from gisp.export.formats.gguf.tokenizer import Vocabulary, read_vocabulary
from gisp.export.formats.hf import pruned_state
from gisp.export.relayout import plan_layers
from gisp.export.spec import ExportReport, PrunedSpec, map_checked
from gisp.model.gguf import EXPORTED
from gisp.model.structures import ModelMap

MODEL_TYPES = ("llama", "mistral", "qwen2")
_ROPE_TYPES = ("default", "linear", "llama3")
_INSTEAD = "use --format hf"


def export_gguf(
    base: Any, spec: PrunedSpec, out: Path, *, tokenizer_from: Path | None = None, dtype: str | None = None
) -> ExportReport:
    """Write ``model.gguf`` and a model card; the logits are compared with the masked base model's first.

    Args:
        base, spec, out: as for :func:`gisp.export.check.write_checked`.
        tokenizer_from: folder with the tokenizer; without one the file works with token ids only.
        dtype: of the matrices, ``f32``, ``f16`` or ``bf16``; vectors are always float32. ``None`` is ``f32`` for
            float32 models and ``f16`` for others: on a CPU llama.cpp rounds the inputs of a product to the type of its
            weights, which costs three more bits in bf16, while f16 holds every bfloat16 weight from 2**-14 to 65504
            exactly and smaller ones within 2**-25.

    Raises:
        GispError: no ``gguf`` package, a model ``deci`` cannot express, ``out`` is taken, full disk, or logits that do
            not agree; nothing is left at ``out``.
    """
    require_gguf()
    model_map = map_checked(base, spec.keep)
    check_expressible(base, model_map)
    kind = DTYPES.get(dtype or ("f32" if weight_dtype(base) == torch.float32 else "f16"))
    if kind is None:
        raise GispError(f"dtype {quoted(dtype)} is not available: choose one of {', '.join(DTYPES)}")
    vocabulary = read_vocabulary(tokenizer_from, model_map.vocab_size, end_tokens(base))
    layouts = plan_layers(model_map, spec.keep)
    with new_folder(out) as folder:
        state = pruned_state(base, model_map, spec.keep, layouts)
        write_gguf(folder / EXPORTED, base, model_map, spec, state, kind, vocabulary)
        report, facts = checked_gguf_report(base, model_map, spec, layouts, folder / EXPORTED, out, kind, vocabulary)
        write_card(folder, base, spec, report, _card(vocabulary, facts))
    return report


def check_expressible(base: Any, model_map: ModelMap) -> None:
    """Refuse what llama.cpp's ``deci`` layers compute otherwise.

    Raises:
        GispError: names the first such thing.
    """
    config = base.config
    if model_map.model_type not in MODEL_TYPES:
        raise GispError(
            f"model type {model_map.model_type!r} cannot be written as gguf: llama.cpp takes uneven layers of "
            f"{', '.join(MODEL_TYPES)}, {_INSTEAD}"
        )
    window = _sliding_window(config)
    if window is not None:
        raise GispError(
            f"attention has a sliding window of {window} tokens, which llama.cpp's uneven layers lack: {_INSTEAD}"
        )
    rope = config.rope_parameters
    if rope["rope_type"] not in _ROPE_TYPES or rope.get("partial_rotary_factor") not in (None, 1.0):
        raise GispError(
            f"rotary embedding {dict(rope)} cannot be written as gguf: {', '.join(_ROPE_TYPES)} over whole heads can, "
            f"{_INSTEAD}"
        )
    if config.hidden_act != "silu":
        raise GispError(f"hidden_act {config.hidden_act!r} cannot be written as gguf: silu can, {_INSTEAD}")


def end_tokens(model: Any) -> list[int]:
    """Tokens at which the model's generation ends, by its generation settings."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def _sliding_window(config: Any) -> int | None:
    """The sliding window, if attention is ever cut by it."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or window >= config.max_position_embeddings:
        return None
    return window if types is None or "sliding_attention" in types else None


def _card(vocabulary: Vocabulary | None, facts: list[tuple[str, str]]) -> CardKind:
    return CardKind(
        title="GGUF",
        library="gguf",
        tags=("gguf", "llama.cpp"),
        load="gguf" if vocabulary else "gguf_ids",
        facts=tuple(facts),
    )
