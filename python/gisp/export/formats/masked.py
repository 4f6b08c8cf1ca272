"""Export of the pruned model with dense shapes, for tools that know nothing of pruned ones."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from gisp.export.card import MASKED
from gisp.export.check import write_checked
from gisp.export.folder import is_tied
from gisp.export.relayout import LaidOut, stored_state
from gisp.export.sizes.layout import ZEROED
from gisp.export.spec import ExportReport, PrunedSpec, gisp_record, map_checked
from gisp.model.keep import Keep, kv_heads
from gisp.model.structures import ModelMap


def export_masked(base: Any, spec: PrunedSpec, out: Path, *, tokenizer_from: Path | None = None) -> ExportReport:
    """Write the base model with zeros in every removed structure; it loads everywhere and is no smaller or faster.

    Arguments and errors are those of :func:`gisp.export.check.write_checked`.
    """
    model_map = map_checked(base, spec.keep)
    config = deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.dtype = base.get_input_embeddings().weight.dtype
    config.tie_word_embeddings = is_tied(base)
    config.gisp = {**gisp_record(base, spec), "masked": True}
    weights = masked_state(base, model_map, spec.keep)
    return write_checked(base, model_map, spec, out, weights, config, tokenizer_from, MASKED)


def masked_state(base: Any, model_map: ModelMap, keep: Keep) -> LaidOut:
    """Weights of the dense model by name, zero in the removed structures; key/value heads go with their last head."""
    shown = [
        {
            "heads": _slots(heads, model_map.num_heads),
            "kv_heads": _slots(kv_heads(heads, model_map.heads_per_kv), model_map.num_kv_heads),
            "channels": _slots(channels, model_map.intermediate_size),
        }
        for heads, channels in keep.layers
    ]
    return stored_state(base, model_map, shown)


def _slots(kept: Sequence[int], count: int) -> list[int]:
    """Every structure in its own place, ``ZEROED`` in that of removed ones."""
    stays = set(kept)
    return [index if index in stays else ZEROED for index in range(count)]
