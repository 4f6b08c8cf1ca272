"""What an export stores of a pruned point: other than what was removed, where key/value heads are shared unevenly.

A layer whose kept query heads are spread unevenly over key/value heads is exported with zeroed query heads or with
key/value heads stored twice (:mod:`gisp.export.sizes.layout`), and an empty block keeps one zeroed head or channel.
Numpy is enough here: sizes are told where no model is at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gisp.export.sizes.layout import plan_attention

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Biases of records of before these told them, by model type; of other types hardly a model has any.
_BIASED = {"qwen2": ("q_proj", "k_proj", "v_proj")}
_plan = lru_cache(maxsize=65536)(plan_attention)


@dataclass(frozen=True)
class StoredSize:
    """Size of the ``hf`` export of a point.

    Attributes:
        parameters: of the whole model, tied ones once.
        kv_heads: key/value heads of all layers.
        head_dim: numbers of a key (and of a value) of one of them.
    """

    parameters: int
    kv_heads: int
    head_dim: int

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Key/value cache of one token, all layers, for numbers of so many bytes."""
        return 2 * self.kv_heads * self.head_dim * element_bytes


def stored_sizes(
    base: Mapping[str, Any], heads: Sequence[np.ndarray], channels: Sequence[np.ndarray], steps: Sequence[int]
) -> list[StoredSize]:
    """Stored sizes at some steps of a run.

    Args:
        base: ``base_model`` of the run's record.
        heads, channels: by layer int32 [count], 0 = kept, t = removed at step t.
        steps: which to tell; 0 is the dense model.
    """
    head, kv_head, channel = _costs(base)
    num_heads, num_kv_heads, width = (
        int(base[name]) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    )
    found = []
    for step in steps:
        parameters, total = int(base["parameters"]), 0
        for heads_at, channels_at in zip(heads, channels, strict=True):
            kept = np.flatnonzero((heads_at == 0) | (heads_at > step))
            plan = _plan(tuple(kept.tolist()), num_heads, num_kv_heads)
            parameters -= (num_heads - len(plan.query)) * head + (num_kv_heads - len(plan.kv)) * kv_head
            left = int(((channels_at == 0) | (channels_at > step)).sum())
            parameters -= (width - max(left, 1)) * channel
            total += len(plan.kv)
        found.append(StoredSize(parameters, total, int(base["head_dim"])))
    return found


def _costs(base: Mapping[str, Any]) -> tuple[int, int, int]:
    """Parameters of a query head (rows of q, columns of o), of a key/value head and of a channel, with biases."""
    hidden, head_dim = int(base["hidden_size"]), int(base["head_dim"])
    biased = base.get("biases", _BIASED.get(base["model_type"], ()))

    def biases(*projections: str) -> int:
        return sum(name in biased for name in projections)

    query, kv = (head_dim * (2 * hidden + biases(*rows)) for rows in (("q_proj",), ("k_proj", "v_proj")))
    return query, kv, 3 * hidden + biases("gate_proj", "up_proj")


def element_bytes(
    base: Mapping[str, Any], heads: Sequence[np.ndarray], steps: Sequence[Mapping[str, Any]], dtype: str | None
) -> int | None:
    """Bytes of a number of a run's cache; ``None`` where the record does not tell.

    A run may leave the dtype to the device; the recorded cache size then tells it.

    Args:
        steps: of the record, with ``step`` and ``kv_bytes_per_token``.
        dtype: option of the run.
    """
    share = int(base["num_attention_heads"]) // int(base["num_key_value_heads"])
    for record in steps:
        kept = [np.flatnonzero((at == 0) | (at > record["step"])) // share for at in heads]
        elements = 2 * int(base["head_dim"]) * sum(len(np.unique(read)) for read in kept)
        if elements and record["kv_bytes_per_token"] in (elements, 2 * elements, 4 * elements):
            return int(record["kv_bytes_per_token"]) // elements
    return _DTYPE_BYTES.get(str(dtype))
