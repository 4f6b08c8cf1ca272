"""In which order structures are stored so that what any step keeps comes first, and how much each step keeps.

A structure removed later stands before one removed earlier; those never removed stand first, in their own order. A
key/value head goes when the last query head that reads it goes. Query heads removed at one step stand in the order of
their key/value heads, so that equal groups stay side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gisp.model.structures import channels_name, heads_name, structure_parameters
from gisp.run.trajectory import Trajectory
from gisp_kernels.groups import KINDS, LayerProjection

# Begins the name of what a milestone stores.
MILESTONES = "milestones."
_NEVER = np.iinfo(np.int32).max


@dataclass(frozen=True)
class LayerOrder:
    """Stored order of one layer; int64 [count] each.

    Attributes:
        heads, kv_heads, channels: original index of what is stored at every position.
        kv_of_head: position of the key/value head that the query head stored at every position reads.
    """

    heads: torch.Tensor
    kv_heads: torch.Tensor
    channels: torch.Tensor
    kv_of_head: torch.Tensor


@dataclass(frozen=True)
class Nesting:
    """Orders of all layers, and int32 [steps + 1, layers, 3]: how many of each of ``KINDS`` a step keeps."""

    layers: tuple[LayerOrder, ...]
    prefixes: torch.Tensor


def stored_name(name: str, projection: LayerProjection) -> str:
    """Under which name a weight or bias is stored; one with structures along its columns is stored transposed."""
    return name + ".transposed" * projection.dim


def milestone_name(step: int, name: str) -> str:
    """Under which name a milestone stores what stands for a shared tensor."""
    return f"{MILESTONES}{step}.{name}"


def output_projections(layers: int) -> Iterator[tuple[int, str, LayerProjection]]:
    """Layer, module name and projection of every o_proj and down_proj."""
    for layer, name, item in structure_parameters(layers):
        if item.dim:
            yield layer, name.rpartition(".")[0], item


def nest(trajectory: Trajectory) -> Nesting:
    """The nesting of a run; step 0 is the dense model."""
    base, steps = trajectory.base_model, len(trajectory.steps)
    per_kv = int(base["num_attention_heads"]) // int(base["num_key_value_heads"])
    orders = []
    prefixes = np.zeros((steps + 1, trajectory.layers, len(KINDS)), dtype=np.int32)
    for layer in range(trajectory.layers):
        heads, channels = (_gone(trajectory.removed_at[name(layer)]) for name in (heads_name, channels_name))
        kv_heads = heads.reshape(-1, per_kv).max(1)
        stored_kv = np.argsort(-kv_heads, kind="stable")
        position = np.argsort(stored_kv)
        reads = position[np.arange(len(heads)) // per_kv]
        stored = np.lexsort((np.arange(len(heads)), reads, -heads))
        order = (stored, stored_kv, np.argsort(-channels, kind="stable"), reads[stored])
        orders.append(LayerOrder(*(torch.from_numpy(part.astype(np.int64)) for part in order)))
        for kind, gone in enumerate((heads, kv_heads, channels)):
            prefixes[:, layer, kind] = (gone[None] > np.arange(steps + 1)[:, None]).sum(1)
    return Nesting(tuple(orders), torch.from_numpy(prefixes))


def _gone(removed_at: torch.Tensor) -> np.ndarray:
    """Step at which each structure goes, later than any for those that never do."""
    at = removed_at.numpy().astype(np.int64)
    return np.where(at == 0, _NEVER, at)
