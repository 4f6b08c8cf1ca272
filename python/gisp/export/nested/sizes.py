"""Bytes of every size of a nested checkpoint, told from what its files say of themselves."""

from __future__ import annotations

import torch

from gisp.export.nested.files import NestedFiles
from gisp.export.nested.order import MILESTONES, stored_name
from gisp.model.structures import structure_parameters
from gisp_kernels.groups import KINDS


def shared_bytes(files: NestedFiles) -> list[int]:
    """Bytes of the shared weights that every step shows, the dense model first."""
    prefixes = files.nesting.prefixes.long()
    each = torch.zeros(prefixes.shape[1:], dtype=torch.int64)
    structures = set()
    for layer, name, item in structure_parameters(len(files.nesting.layers)):
        stored, kind = stored_name(name, item), KINDS.index(item.kind)
        if files.holds(stored):
            structures.add(stored)
            each[layer, kind] += files.bytes_of(stored) // int(prefixes[0, layer, kind])
    names = files.record["tensors"]
    rest = sum(files.bytes_of(n) for n in names if n not in structures and not n.startswith(MILESTONES))
    return [rest + shown for shown in (prefixes * each).sum((1, 2)).tolist()]


def own_bytes(files: NestedFiles, step: int) -> int:
    """Bytes that a milestone stores beside the shared weights."""
    names = files.record["tensors"]
    return sum(files.bytes_of(name) for name in names if name.startswith(f"{MILESTONES}{step}."))


def kv_bytes(files: NestedFiles) -> list[int]:
    """Bytes of keys and values that a token needs at every step, in the dtype of the weights, the dense model first."""
    base, numbers = files.record["base_model"], files.nesting.prefixes.long()[:, :, KINDS.index("kv_heads")].sum(1)
    return (2 * int(base["head_dim"]) * _element_size(files) * numbers).tolist()


def _element_size(files: NestedFiles) -> int:
    return files.rows(next(iter(files.record["tensors"])), 0, 0).element_size()
