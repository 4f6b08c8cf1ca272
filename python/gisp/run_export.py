"""From a run folder to an exported model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gisp.errors import GispError
from gisp.export import (
    ExportReport,
    LayerKeep,
    LayerRanking,
    PrunedSpec,
    SizeOptions,
    export_hf,
    export_masked,
    export_uniform,
    round_mlp,
    uniform_spec,
)
from gisp.export.folder import check_place
from gisp.export.rounding import option_text
from gisp.run_quality import Quality, measure_quality
from gisp.structures import channels_name, heads_name, map_model
from gisp.trajectory import Trajectory

FORMATS: dict[str, Callable[..., ExportReport]] = {"hf": export_hf, "masked": export_masked, "uniform": export_uniform}
# Size options each format follows.
SIZES = {"hf": ("round_mlp", "align_heads", "min_heads"), "uniform": ("round_mlp", "align_heads", "min_heads")}
UNMEASURED = (
    "perplexity",
    "not measured; `gisp export RUN --sparsity S --format uniform --data DATA` measures it here and at the exact "
    "pruned point",
)


@dataclass(frozen=True)
class RunExport:
    """What was exported and how it compares with the masked model.

    Attributes:
        point: the point of the run.
        spec: what the export holds; other than the point where sizes were rounded.
        quality: perplexities of both, where asked for.
    """

    point: PrunedSpec
    spec: PrunedSpec
    report: ExportReport
    quality: Quality | None = None


def export_run(
    run: str | Path,
    sparsity: float | None,
    out: str | Path,
    *,
    format: str = "hf",
    device: str = "auto",
    sizes: SizeOptions | None = None,
    data: str | None = None,
    window: int = 128,
) -> RunExport:
    """Export the step of a run whose sparsity is nearest to ``sparsity`` (``None`` = its end).

    Args:
        sizes: what sizes are rounded to.
        data: evaluation data, to measure the perplexity of the export and of the exact point it was made from.
        window: tokens per window of the evaluation.

    Raises:
        GispError: no run there, unknown format, an option the format does not follow, ``out`` taken, another base
            model, unreadable data, or logits that do not agree.
    """
    sizes = sizes or SizeOptions()
    _check_options(format, sizes)
    check_place(Path(out))
    trajectory = Trajectory.load(run)
    point = pruned_spec(trajectory, trajectory.step_for(sparsity))

    def rounded(base: Any, spec: PrunedSpec) -> PrunedSpec:
        if format == "uniform":
            return uniform_spec(base, spec, sizes)
        return spec if sizes.round_mlp is None else round_mlp(map_model(base), spec, sizes.round_mlp)

    quality = None
    if data is not None:
        quality = measure_quality(trajectory, point, rounded, data, window=window, device=device)
    base = trajectory.load_base(device=device, dtype="auto")
    spec = rounded(base, point)
    notes = quality.notes() if quality else (UNMEASURED,) if format == "uniform" else ()
    spec = replace(spec, notes=(*spec.notes, *notes))
    heads = {"align_heads": sizes.align_heads or 1, "min_heads": sizes.min_heads or 1} if format == "hf" else {}
    folder = Path(str(trajectory.base_model["path"]))
    report = FORMATS[format](base, spec, Path(out), tokenizer_from=folder if folder.is_dir() else None, **heads)
    return RunExport(point, spec, report, quality)


def _check_options(format: str, sizes: SizeOptions) -> None:
    if format not in FORMATS:
        raise GispError(f"format {format!r} is not available: choose one of {', '.join(FORMATS)}")
    for name, value in sizes.given().items():
        if name not in SIZES.get(format, ()):
            formats = " or ".join(other for other, names in SIZES.items() if name in names)
            raise GispError(
                f"{option_text({name: value})} changes nothing in format {format}: leave it out, or --format {formats}"
            )


def pruned_spec(trajectory: Trajectory, step: int) -> PrunedSpec:
    """The state after ``step`` in the exporters' terms."""

    def indices(name: str) -> tuple[int, ...]:
        return tuple(trajectory.kept(name, step).tolist())

    layers = tuple(
        LayerKeep(heads=indices(heads_name(i)), channels=indices(channels_name(i))) for i in range(trajectory.layers)
    )
    run: dict[str, Any] = {
        "base_model": trajectory.base_model,
        "config": trajectory.config,
        "versions": trajectory.versions,
    }
    return PrunedSpec(
        layers=layers,
        sparsity=trajectory.sparsity_at(step),
        model_sparsity=trajectory.model_sparsity_at(step),
        step=step,
        run=run,
        ranking=tuple(_ranking(trajectory, i) for i in range(trajectory.layers)),
    )


def _ranking(trajectory: Trajectory, layer: int) -> LayerRanking:
    heads, channels = (trajectory.removed_at[name(layer)] for name in (heads_name, channels_name))
    return LayerRanking(
        heads=last_to_go(heads),
        channels=last_to_go(channels),
        tied_heads=int((heads == 0).sum()),
        tied_channels=int((channels == 0).sum()),
    )


def last_to_go(removed_at: torch.Tensor) -> tuple[int, ...]:
    """Structures of a group, those the run kept first, then those it removed latest; ties by lowest index.

    Args:
        removed_at: int32 [structures], 0 = kept, t = removed at step t.
    """
    steps = removed_at.tolist()
    return tuple(sorted(range(len(steps)), key=lambda i: (steps[i] != 0, -steps[i], i)))
