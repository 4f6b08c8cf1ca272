"""Export of the pruned model with dense shapes, for tools that know nothing of pruned ones."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from gisp.export.card import MASKED
from gisp.export.check import write_checked
from gisp.export.folder import dense_state
from gisp.export.spec import ExportReport, PrunedSpec, gisp_record, map_checked
from gisp.model.keep import Keep, kv_heads, missing
from gisp.model.structures import ModelMap, structure_parameters


def export_masked(base: Any, spec: PrunedSpec, out: Path, *, tokenizer_from: Path | None = None) -> ExportReport:
    """Write the base model with zeros in every removed structure; it loads everywhere and is no smaller or faster.

    Args:
        base: the dense model the spec was made from; left as it was.
        spec: what to keep.
        out: folder to write; must be absent or empty.
        tokenizer_from: folder to copy tokenizer files and ``generation_config.json`` from.

    Raises:
        GispError: ``out`` is taken, full disk, or logits that do not agree; nothing is left at ``out``.
    """
    model_map = map_checked(base, spec.keep)
    config = deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.dtype = base.get_input_embeddings().weight.dtype
    config.gisp = {**gisp_record(base, spec), "masked": True}
    return write_checked(
        base, model_map, spec, out, lambda: masked_state(base, model_map, spec.keep), config, tokenizer_from, MASKED
    )


def masked_state(base: Any, model_map: ModelMap, keep: Keep) -> dict[str, torch.Tensor]:
    """Weights of the dense model by name, zero in the removed structures; key/value heads go with their last head."""
    state = dense_state(base)
    gone = [
        {
            "heads": missing(heads, model_map.num_heads),
            "kv_heads": missing(kv_heads(heads, model_map.heads_per_kv), model_map.num_kv_heads),
            "channels": missing(channels, model_map.intermediate_size),
        }
        for heads, channels in keep.layers
    ]
    for layer, name, item in structure_parameters(len(gone)):
        if name in state:
            state[name] = _zero(state[name], gone[layer][item.kind], item.block(model_map.head_dim), item.dim)
    return state


def _zero(tensor: torch.Tensor, index: list[int], block: int, dim: int) -> torch.Tensor:
    positions = torch.tensor(index, dtype=torch.int64, device=tensor.device)
    return tensor.unflatten(dim, (-1, block)).index_fill(dim, positions, 0).flatten(dim, dim + 1)
