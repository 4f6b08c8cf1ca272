"""What an export takes and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gisp.errors import GispError
from gisp.model.keep import Keep
from gisp.model.structures import ModelMap, channels_name, fingerprint, heads_name, map_model
from gisp.run.evaluations import Evaluation
from gisp.run.trajectory import Trajectory

FORMAT_VERSION = 1
TOLERANCE = 1e-5
"""Relative difference of logits between an export and the masked dense model, both in float32, that is no rounding of a
deep model (gisp.export.check)."""


@dataclass(frozen=True)
class LayerRanking:
    """All structures of one layer, original indices, in the order in which they are kept: the last to go is first.

    Attributes:
        tied_heads, tied_channels: how many at the beginning the run never removed, so that their order is arbitrary.
    """

    heads: tuple[int, ...]
    channels: tuple[int, ...]
    tied_heads: int = 0
    tied_channels: int = 0

    @classmethod
    def of(cls, trajectory: Trajectory, layer: int) -> LayerRanking:
        """The order in which a run removed structures."""
        heads, channels = (trajectory.removed_at[name(layer)] for name in (heads_name, channels_name))
        return cls(last_to_go(heads), last_to_go(channels), int((heads == 0).sum()), int((channels == 0).sum()))


def last_to_go(removed_at: torch.Tensor) -> tuple[int, ...]:
    """Structures of a group, those the run kept first, then those it removed latest; ties by lowest index.

    Args:
        removed_at: int32 [structures], 0 = kept, t = removed at step t.
    """
    steps = removed_at.tolist()
    return tuple(sorted(range(len(steps)), key=lambda i: (steps[i] != 0, -steps[i], i)))


@dataclass(frozen=True)
class PrunedSpec:
    """One point of a pruning run, or what it became when its sizes were rounded.

    Attributes:
        keep: what stays.
        sparsity: removed parameters / parameters of the decoder layers.
        model_sparsity: removed parameters / parameters of the whole model.
        step: number of the step, 0 = dense.
        run: ``base_model``, ``config``, ``data`` and ``versions`` of the run, for the model card; ``data`` with the
            ``tokens`` scored on the way.
        ranking: of every layer, for exports that round sizes; empty where it is not known.
        options: sizes asked for (``round_mlp``, ``align_heads``, ``min_heads``), for the model card.
        notes: further rows of the model card, (what, value).
        compensation: what was done to the output projections of the base model given to the exporter.
        evaluations: of the point and of the dense model, for the model card.
    """

    keep: Keep
    sparsity: float
    model_sparsity: float
    step: int
    run: dict[str, Any]
    ranking: tuple[LayerRanking, ...] = ()
    options: dict[str, int] = field(default_factory=dict)
    notes: tuple[tuple[str, str], ...] = ()
    compensation: str = ""
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def base_path(self) -> str:
        """Folder or hub name of the base model; empty where it is not known."""
        return str((self.run.get("base_model") or {}).get("path") or "")

    @classmethod
    def at(cls, trajectory: Trajectory, step: int) -> PrunedSpec:
        """The state of a run after ``step``."""
        run = {name: getattr(trajectory, name) for name in ("base_model", "config", "versions")}
        tokens = sum(record.tokens for record in trajectory.steps[:step])
        return cls(
            keep=trajectory.keep(step),
            sparsity=trajectory.sparsity_at(step),
            model_sparsity=trajectory.model_sparsity_at(step),
            step=step,
            run={**run, "data": {**trajectory.data, "tokens": tokens}},
            ranking=tuple(LayerRanking.of(trajectory, layer) for layer in range(trajectory.layers)),
        )


@dataclass(frozen=True)
class LayerSizes:
    """Shapes of one exported layer.

    Attributes:
        heads: query heads the pruning kept.
        query_heads: query heads stored, zeroed slots of the key/value re-layout included.
        kv_heads: key/value heads stored, replicas included.
        channels: MLP channels stored.
    """

    heads: int
    query_heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far its logits are from those of the masked dense model (both in float32).

    Attributes:
        absolute_difference: largest absolute difference of two logits.
        relative_difference: the same divided by the largest absolute logit.
        parameters_dense: parameters of the base model, tied ones once.
        parameters_pruned: parameters stored in the export.
        bytes: size of the weight files.
        kv_bytes_per_token: key/value cache of one token, all layers, in the dtype of the export (gguf: in float16,
            which llama.cpp takes unless told otherwise).
        kv_bytes_per_token_dense: the same for the base model.
        tolerance: relative difference up to which the export was accepted.
    """

    path: Path
    absolute_difference: float
    relative_difference: float
    parameters_dense: int
    parameters_pruned: int
    bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_token_dense: int
    sizes: tuple[LayerSizes, ...]
    tolerance: float = TOLERANCE

    @property
    def tensor_parallel(self) -> tuple[int, ...]:
        """Numbers of devices that can share every layer evenly: query heads and channels divided, key/value heads
        divided or repeated."""
        return tuple(
            devices
            for devices in range(1, min(item.query_heads for item in self.sizes) + 1)
            if all(
                item.query_heads % devices == 0
                and item.channels % devices == 0
                and (item.kv_heads % devices == 0 or devices % item.kv_heads == 0)
                for item in self.sizes
            )
        )


@dataclass(frozen=True)
class NestedMilestone:
    """A size of a nested checkpoint that carries its own compensation.

    Attributes:
        sparsity: of the decoder layers.
        bytes: stored beside the shared weights; 0 where nothing of the compensation was kept.
        compensation: what was done and accepted.
    """

    sparsity: float
    bytes: int
    compensation: str


@dataclass(frozen=True)
class NestedReport:
    """What was written and how far its logits are from those of the masked dense model (both in float32).

    Attributes:
        relative_differences: by sparsity, largest difference over the largest logit.
        bytes: of the weight files.
        steps: sparsities the checkpoint holds beside the dense model.
        tolerance: relative difference up to which it was accepted.
        milestones: sizes with a compensation of their own.
        url: where on the hub it is, where asked for.
    """

    path: Path
    relative_differences: dict[float, float]
    bytes: int
    steps: int
    tolerance: float = TOLERANCE
    milestones: tuple[NestedMilestone, ...] = ()
    url: str = ""


def map_checked(base: Any, keep: Keep) -> ModelMap:
    """The structure map of the base model, checked to have what is kept.

    Raises:
        GispError: the base is no dense causal language model, or one of another shape.
    """
    model_map = map_model(base)
    if base.get_output_embeddings() is None:
        raise GispError(f"{type(base).__name__} has no output embeddings: give the causal language model")
    if len(keep.heads) != len(model_map.layers):
        raise GispError(f"the pruning has {len(keep.heads)} layers, the base {len(model_map.layers)}: give its base")
    for kind, layers, count in (
        ("heads", keep.heads, model_map.num_heads),
        ("channels", keep.channels, model_map.intermediate_size),
    ):
        for layer, kept in enumerate(layers):
            ascending = list(kept) == sorted(set(kept))
            if kept and (not ascending or kept[0] < 0 or kept[-1] >= count):
                raise GispError(f"kept {kind} of layer {layer} are not ascending indices in 0..{count - 1}")
    return model_map


def gisp_record(base: Any, spec: PrunedSpec) -> dict[str, Any]:
    """What ``config.json`` says about the pruning."""
    record = {
        "format_version": FORMAT_VERSION,
        "sparsity": spec.sparsity,
        "model_sparsity": spec.model_sparsity,
        "step": spec.step,
        "base_fingerprint": (spec.run.get("base_model") or {}).get("fingerprint") or fingerprint(base),
    }
    if spec.compensation:
        record["compensation"] = spec.compensation
    return {**record, "options": spec.options} if spec.options else record
