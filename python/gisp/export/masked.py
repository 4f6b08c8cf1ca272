"""Export of the pruned model with dense shapes, for tools that know nothing of pruned ones."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from gisp.export.card import MASKED, write_card
from gisp.export.check import checked_report
from gisp.export.folder import copy_base_files, dense_state, new_folder, write_weights
from gisp.export.spec import ExportReport, LayerKeep, PrunedSpec, gisp_record, map_checked
from gisp.model.structures import ModelMap


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
    model_map = map_checked(base, spec)
    with new_folder(out) as folder:
        size = write_weights(folder, masked_state(base, model_map, spec))
        config = deepcopy(base.config)
        config.architectures = [type(base).__name__]
        config.dtype = base.get_input_embeddings().weight.dtype
        config.gisp = {**gisp_record(base, spec), "masked": True}
        config.save_pretrained(folder)
        copy_base_files(folder, base, tokenizer_from)
        report = checked_report(base, model_map, spec, folder, out, size)
        write_card(folder, base, spec, report, MASKED)
    return report


def masked_state(base: Any, model_map: ModelMap, spec: PrunedSpec) -> dict[str, torch.Tensor]:
    """Weights of the dense model by name, zero in the removed structures; key/value heads go with their last head."""
    state = dense_state(base)
    for item, keep in zip(model_map.layers, spec.layers, strict=True):
        for name, index, block, dim in _removed_blocks(keep, model_map):
            weight = f"model.layers.{item.index}.{name}.weight"
            state[weight] = _zero(state[weight], index, block, dim)
            bias = f"model.layers.{item.index}.{name}.bias"
            if dim == 0 and bias in state:
                state[bias] = _zero(state[bias], index, block, 0)
    return state


def _removed_blocks(keep: LayerKeep, model_map: ModelMap) -> list[tuple[str, list[int], int, int]]:
    """Projection, removed block indices, block size and dimension, for every projection of a layer."""
    per_kv = model_map.num_heads // model_map.num_kv_heads
    kept_kv = {head // per_kv for head in keep.heads}
    heads = sorted(set(range(model_map.num_heads)) - set(keep.heads))
    kv = sorted(set(range(model_map.num_kv_heads)) - kept_kv)
    channels = sorted(set(range(model_map.intermediate_size)) - set(keep.channels))
    width = model_map.head_dim
    return [
        ("self_attn.q_proj", heads, width, 0),
        ("self_attn.k_proj", kv, width, 0),
        ("self_attn.v_proj", kv, width, 0),
        ("self_attn.o_proj", heads, width, 1),
        ("mlp.gate_proj", channels, 1, 0),
        ("mlp.up_proj", channels, 1, 0),
        ("mlp.down_proj", channels, 1, 1),
    ]


def _zero(tensor: torch.Tensor, index: list[int], block: int, dim: int) -> torch.Tensor:
    positions = torch.tensor(index, dtype=torch.int64, device=tensor.device)
    return tensor.unflatten(dim, (-1, block)).index_fill(dim, positions, 0).flatten(dim, dim + 1)
