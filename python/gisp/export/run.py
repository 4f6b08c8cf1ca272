"""From a run folder to an exported model, and what rounding and compensation do to its perplexity."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gisp.compensation import Compensation, CompensationRequest, fold_into_dense
from gisp.errors import GispError, quoted
from gisp.export.beside import base_folder
from gisp.export.folder import export_place
from gisp.export.formats.gguf.file import require_gguf
from gisp.export.hub import check_push, push_folder
from gisp.export.nested.export import export_nested
from gisp.export.nested.milestones import Milestone, fit_milestones
from gisp.export.nested.request import check_request, milestone_steps
from gisp.export.quality.measure import UNMEASURED, Quality, measure_quality
from gisp.export.quality.plans import UNPLANNED, Plans, make_plans
from gisp.export.quality.wanted import Together, Wanted
from gisp.export.sizes.options import FORMATS, SizeOptions, check_options
from gisp.export.spec import ExportReport, NestedReport, PrunedSpec
from gisp.files import as_path
from gisp.model.gguf import tokenizer_folder
from gisp.model.modes import default_device
from gisp.model.structures import map_model
from gisp.progress import reporting
from gisp.replicas.sharing import alone, sharing
from gisp.run.evaluations import read_evaluations
from gisp.run.resources.base import BasePlace
from gisp.run.trajectory import Trajectory
from gisp.stages.rules import Sharing, check_sharing


@dataclass(frozen=True)
class RunExport:
    """What was exported and how it compares with the masked model.

    Attributes:
        point: the point of the run.
        spec: what the export holds; other than the point where sizes were rounded.
        quality: perplexities of both, where asked for.
        url: where on the hub it is, where asked for.
    """

    point: PrunedSpec
    spec: PrunedSpec
    report: ExportReport
    quality: Quality | None = None
    url: str = ""


@default_device()
@reporting(None)
def export_run(
    run: str | Path,
    sparsity: float | None,
    out: str | Path,
    *,
    format: str = "hf",
    device: str = "auto",
    sizes: SizeOptions | None = None,
    data: str | Path | None = None,
    window: int | None = None,
    dtype: str | None = None,
    compensation: CompensationRequest | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
    together: Together = alone,
    offload: bool = False,
    gpu_memory: str | None = None,
) -> RunExport:
    """Export the step of a run whose sparsity is nearest to ``sparsity`` (``None`` = its end).

    Args:
        run: run folder.
        out: folder to write; must be absent or empty.
        format: ``hf``, ``gguf``, ``uniform`` or ``masked``.
        device: where logits are compared: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        sizes: what the sizes of layers are rounded to.
        data: evaluation data. If given, the perplexity of the export and of the exact point are measured.
        window: longest input of this evaluation in tokens, as for ``gisp eval``.
        dtype: only for format ``gguf``: dtype of the matrices, ``f32``, ``f16`` or ``bf16``.
        compensation: a compensation of the export. It is fitted in the dtype of the run and rounded to that of the base
            model.
        push_to_hub: repository of the Hugging Face hub to upload the export to.
        private: whether a new repository is private.
        together: opens the processes that share measuring and fitting. This process is the first of them; the others
            call :func:`take_part`.
        offload: keep the layers of the base model in host memory while measuring and fitting, and read them from their
            files while the export is written and checked. The files are the same. Not for several processes.
        gpu_memory: only with ``offload``: the most GPU memory to take, as ``24GB``.

    Raises:
        GispError: there is no run, the format is unknown or does not support an option, ``out`` is taken, the base
            model is another one, data cannot be read, the format cannot hold the compensation, logits do not agree, the
            model does not fit, or the upload fails (the export then stays at ``out``).
    """
    place, folder, spec = as_path(out, "out"), as_path(run, "run"), None if data is None else str(as_path(data, "data"))
    sizes = sizes or SizeOptions()
    _check_kind("sizes", sizes, SizeOptions)
    _check_kind("compensation", compensation, CompensationRequest)
    check_options(format, sizes, dtype, spec, window)
    if format == "gguf":
        require_gguf()  # before a large model is loaded
    if push_to_hub is not None:
        check_push(push_to_hub, private)
    with export_place(place) as place:
        base = BasePlace(device, offload, gpu_memory)
        wanted = Wanted(folder, sparsity, format, base, sizes, spec, window, compensation, together)
        found = _export(wanted, place, dtype)
        return found if push_to_hub is None else replace(found, url=push_folder(place, push_to_hub, private))


def _check_kind(name: str, value: object, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise GispError(f"{name} is {quoted(value)}: give a {kind.__name__}")


def _export(wanted: Wanted, out: Path, dtype: str | None) -> RunExport:
    """:func:`export_run` with its options checked and ``out`` reserved."""
    trajectory, format, sizes = Trajectory.load(wanted.run), wanted.format, wanted.sizes
    point, quality, fitted, plans = _measured(trajectory, wanted)
    base, source = _base_of(trajectory, wanted.place, plans)
    spec = wanted.rounded(base, point)
    if wanted.compensation is not None and fitted is not None:
        # Exporters see a base model with other output projections, and compare with it masked.
        fold_into_dense(map_model(base), fitted)
        spec = replace(spec, compensation=wanted.compensation.describe(fitted))
        del fitted
    notes = quality.notes() if quality else (UNMEASURED,) if format == "uniform" else ()
    spec = replace(spec, notes=(*spec.notes, *notes))
    options: dict[str, Any] = {"dtype": dtype} if format == "gguf" else {}
    if format == "hf":
        options = {"align_heads": sizes.align_heads or 1, "min_heads": sizes.min_heads or 1}
    with tokenizer_folder(source) as folder:
        report = FORMATS[format].writer(base, spec, out, tokenizer_from=folder, **options)
    return RunExport(point, spec, report, quality)


def take_part(
    run: str | Path,
    sparsity: float | None,
    *,
    together: Together,
    format: str = "hf",
    device: str = "auto",
    sizes: SizeOptions | None = None,
    data: str | None = None,
    window: int | None = None,
    compensation: CompensationRequest | None = None,
) -> None:
    """Measure and fit with the process that calls :func:`export_run` with the same arguments."""
    sizes = sizes or SizeOptions()
    wanted = Wanted(Path(run), sparsity, format, BasePlace(device), sizes, data, window, compensation, together)
    _measured(Trajectory.load(run), wanted)


def _measured(trajectory: Trajectory, wanted: Wanted) -> tuple[PrunedSpec, Quality | None, Compensation | None, Plans]:
    """The point of a run, its perplexity and a compensation of what is made of it, as far as asked for, and plans."""
    point = point_of(trajectory, wanted.run, trajectory.step_for(wanted.sparsity))
    plans = make_plans(trajectory, wanted, point)
    if wanted.data is None and wanted.compensation is None:
        return point, None, None, plans
    with wanted.together() as replicas, sharing(replicas) as sharers:
        if wanted.place.offload:
            check_sharing(Sharing(sharers.size, offload="always"))
        quality, fitted = measure_quality(trajectory, wanted, point, plans)
    return point, quality, fitted, plans


def point_of(trajectory: Trajectory, run: Path, step: int) -> PrunedSpec:
    """A point of a run with what was measured there and on the dense model."""
    removed_at = {name: at.numpy() for name, at in trajectory.removed_at.items()}
    measured = read_evaluations(run, str(trajectory.base_model["fingerprint"]), removed_at)
    here = tuple(e for e in measured if e.step in (0, step) or e.sparsity in (0.0, trajectory.sparsity_at(step)))
    return replace(PrunedSpec.at(trajectory, step), evaluations=here)


@default_device()
@reporting(None)
def export_nested_run(
    run: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    compensation: CompensationRequest | None = None,
    sparsities: Sequence[float] = (),
    push_to_hub: str | None = None,
    private: bool = True,
    together: Together = alone,
) -> NestedReport:
    """Write the nested checkpoint of a run: every sparsity it passed in one set of weights.

    Args:
        compensation: of ``sparsities``, fitted to each as for an export of that size and stored beside the weights.
        sparsities: of each the nearest step carries its own compensation.
        push_to_hub, private: as for :func:`export_run`.
        together: as for :func:`export_run`; the others call :func:`take_part_nested`.

    Raises:
        GispError: no run there, ``out`` taken, another base model, a compensation without sparsities or these without
            it, a sparsity beyond the run or two of one step, logits that do not agree, or a hub that does not take the
            checkpoint, which then stays at ``out``.
    """
    place = as_path(out, "out")
    _check_kind("compensation", compensation, CompensationRequest)
    check_request(compensation, sparsities)
    if push_to_hub is not None:
        check_push(push_to_hub, private)
    with export_place(place) as place:
        trajectory = Trajectory.load(run)
        milestones = _milestones(trajectory, sparsities, compensation, device, together)
        base, source = _base_of(trajectory, BasePlace(device))
        with tokenizer_folder(source) as folder:
            report = export_nested(base, trajectory, place, tokenizer_from=folder, milestones=milestones)
        return report if push_to_hub is None else replace(report, url=push_folder(place, push_to_hub, private))


def take_part_nested(
    run: str | Path,
    *,
    together: Together,
    device: str = "auto",
    compensation: CompensationRequest | None = None,
    sparsities: Sequence[float] = (),
) -> None:
    """Fit with the process that calls :func:`export_nested_run` with the same arguments."""
    _milestones(Trajectory.load(run), sparsities, compensation, device, together)


def _milestones(
    trajectory: Trajectory,
    sparsities: Sequence[float],
    compensation: CompensationRequest | None,
    device: str,
    together: Together,
) -> list[Milestone]:
    steps = milestone_steps(
        [trajectory.sparsity_at(t) for t in range(len(trajectory.steps) + 1)], sparsities, trajectory.goal
    )
    if compensation is None:
        return []
    with together() as replicas, sharing(replicas):
        return fit_milestones(trajectory, steps, compensation, device)


def _base_of(trajectory: Trajectory, place: BasePlace, plans: Plans = UNPLANNED) -> tuple[Any, Path | None]:
    """The base model of a run in its own dtype, and its folder or file if it has one."""
    # One that was measured goes first: a model and what shrinks it hold one another.
    gc.collect()
    base = place.load(trajectory, dtype="auto", plan=plans.writing)
    return base, base_folder(str(trajectory.base_model["path"]))
