"""From a run folder to an exported model, and what rounding and compensation do to its perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from gisp.compensation import Compensation, CompensationRequest, fit_compensation, fold_into_dense, fold_into_pruned
from gisp.evaluate import EvalOptions, Perplexity
from gisp.evaluate.data import prepare
from gisp.export.beside import base_folder
from gisp.export.folder import export_place
from gisp.export.formats.gguf.file import require_gguf
from gisp.export.formats.uniform import uniform_spec
from gisp.export.hub import check_push, push_folder
from gisp.export.nested.export import export_nested
from gisp.export.nested.milestones import Milestone, fit_milestones
from gisp.export.nested.request import check_request, milestone_steps
from gisp.export.sizes.options import FORMATS, SizeOptions, check_options
from gisp.export.sizes.rounding import round_mlp
from gisp.export.spec import ExportReport, NestedReport, PrunedSpec
from gisp.model.gguf import tokenizer_folder
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.progress import reporting
from gisp.replicas.group import Replicas
from gisp.replicas.sharing import alone, sharing
from gisp.run.evaluations import read_evaluations
from gisp.run.trajectory import Trajectory

Together = Callable[[], AbstractContextManager[Replicas | None]]
"""Brings processes together for a while; ``None`` for one on its own."""

UNMEASURED = (
    "perplexity",
    "not measured; `gisp export RUN --sparsity S --format uniform --data DATA` measures it here and at the exact "
    "pruned point",
)


@dataclass(frozen=True)
class Quality:
    """Perplexity of the exact pruned point and of what is exported, on the same tokens.

    Attributes:
        data: name of the evaluation data.
        dtype: of the weights while it was measured.
        compensated: whether the export is compensated; the point never is.
    """

    point: Perplexity
    exported: Perplexity
    data: str
    dtype: str
    compensated: bool = False

    def notes(self) -> tuple[tuple[str, str], ...]:
        """Lines of the model card and the command line."""
        how = f"{self.exported.tokens:,} tokens of {self.data}, window {self.exported.window}, {self.dtype}"
        rows = [("perplexity", f"{self.exported.perplexity:.4f} ({how})")]
        if self.exported is not self.point:
            what = " without compensation" if self.compensated else ""
            rows.append((f"perplexity of the exact pruned point{what}, same tokens", f"{self.point.perplexity:.4f}"))
        return tuple(rows)


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


@reporting(None)
def export_run(
    run: str | Path,
    sparsity: float | None,
    out: str | Path,
    *,
    format: str = "hf",
    device: str = "auto",
    sizes: SizeOptions | None = None,
    data: str | None = None,
    window: int | None = None,
    dtype: str | None = None,
    compensation: CompensationRequest | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
    together: Together = alone,
) -> RunExport:
    """Export the step of a run whose sparsity is nearest to ``sparsity`` (``None`` = its end).

    Args:
        sizes: what sizes are rounded to.
        data: evaluation data, to measure the perplexity of the export and of the exact point it was made from.
        window: longest input of the evaluation in tokens, as for ``gisp eval``.
        dtype: of the matrices of a ``gguf`` export: ``f32``, ``f16`` or ``bf16``.
        compensation: of what is exported, fitted in the dtype of the run and rounded to the base model's.
        push_to_hub: repository of the Hugging Face hub to upload the export to, ``private`` unless told otherwise.
        together: the processes that share what is measured and fitted, for as long as that takes. This is the first
            of them, the others call :func:`take_part`.

    Raises:
        GispError: no run there, unknown format, an option the format does not follow, ``out`` taken, another base
            model, unreadable data, a compensation the format cannot hold, logits that do not agree, or a hub that
            does not take the export, which then stays at ``out``.
    """
    sizes = sizes or SizeOptions()
    check_options(format, sizes, dtype)
    if format == "gguf":
        require_gguf()  # before a large model is loaded
    if push_to_hub is not None:
        check_push(push_to_hub, private)
    with export_place(Path(out)) as place:
        found = _export(run, sparsity, place, format, device, sizes, data, window, dtype, compensation, together)
        return found if push_to_hub is None else replace(found, url=push_folder(place, push_to_hub, private))


def _export(
    run: str | Path,
    sparsity: float | None,
    out: Path,
    format: str,
    device: str,
    sizes: SizeOptions,
    data: str | None,
    window: int | None,
    dtype: str | None,
    compensation: CompensationRequest | None,
    together: Together,
) -> RunExport:
    """:func:`export_run` with its options checked and ``out`` reserved."""
    trajectory = Trajectory.load(run)
    point, quality, fitted = _measured(
        trajectory, Path(run), sparsity, format, device, sizes, data, window, compensation, together
    )
    base, source = _base_of(trajectory, device)
    spec = _rounded(base, point, format, sizes)
    if compensation is not None and fitted is not None:
        # Exporters see a base model with other output projections, and compare with it masked.
        fold_into_dense(map_model(base), fitted)
        spec = replace(spec, compensation=compensation.describe(fitted))
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
    trajectory = Trajectory.load(run)
    chosen = sizes or SizeOptions()
    _measured(trajectory, Path(run), sparsity, format, device, chosen, data, window, compensation, together)


def _measured(
    trajectory: Trajectory,
    run: Path,
    sparsity: float | None,
    format: str,
    device: str,
    sizes: SizeOptions,
    data: str | None,
    window: int | None,
    compensation: CompensationRequest | None,
    together: Together,
) -> tuple[PrunedSpec, Quality | None, Compensation | None]:
    """The point of a run, its perplexity and a compensation of what is made of it, as far as asked for."""
    point = point_of(trajectory, run, trajectory.step_for(sparsity))
    if data is None and compensation is None:
        return point, None, None
    with together() as replicas, sharing(replicas):
        quality, fitted = measure_quality(
            trajectory,
            point,
            partial(_rounded, format=format, sizes=sizes),
            data,
            window=window,
            device=device,
            request=compensation,
            format=format,
        )
    return point, quality, fitted


def _rounded(base: Any, spec: PrunedSpec, format: str, sizes: SizeOptions) -> PrunedSpec:
    """What is exported of a point."""
    if format == "uniform":
        return uniform_spec(base, spec, sizes)
    return spec if sizes.round_mlp is None else round_mlp(map_model(base), spec, sizes.round_mlp)


def point_of(trajectory: Trajectory, run: Path, step: int) -> PrunedSpec:
    """A point of a run with what was measured there and on the dense model."""
    measured = read_evaluations(run, str(trajectory.base_model["fingerprint"]))
    here = tuple(e for e in measured if e.step in (0, step) or e.sparsity in (0.0, trajectory.sparsity_at(step)))
    return replace(PrunedSpec.at(trajectory, step), evaluations=here)


def measure_quality(
    trajectory: Trajectory,
    point: PrunedSpec,
    rounded: Callable[[nn.Module, PrunedSpec], PrunedSpec],
    data: str | None,
    *,
    window: int | None,
    device: str,
    request: CompensationRequest | None = None,
    format: str = "hf",
) -> tuple[Quality | None, Compensation | None]:
    """Perplexity of a point of a run and of what rounding and compensation make of it, measured as ``gisp eval`` does.

    Args:
        rounded: the exported spec, from the dense base model and the point.
        data: evaluation data, as for ``gisp eval``; None to measure nothing.
        request: compensation of the exported spec, fitted in the dtype of the run.
        format: of the export, which says what a compensation may change.

    Raises:
        GispError: the data cannot be read, a loss is NaN, or the format cannot hold the compensation.
    """
    model = trajectory.load_base(device=device)
    model_map = map_model(model)
    source = str(trajectory.base_model["path"])
    # Data that cannot be read is found before anything costly.
    measure = None if data is None else prepare(data, EvalOptions(window=window), model, source)
    exported = rounded(model, point)
    compensation = None
    if request is not None:
        options = request.for_format(format, model_map)
        compensation = fit_compensation(model_map, exported.keep, request.calibration, options, tokenizer_from=source)
    if data is None or measure is None:
        return None, compensation
    shrinkable = ShrinkableModel(model_map)

    def result(spec: PrunedSpec, folded: Compensation | None = None) -> Perplexity:
        shrinkable.remove(spec.keep.removed(model_map))
        if folded is not None:
            fold_into_pruned(shrinkable, folded)
        found = measure(model)
        shrinkable.rollback()
        return Perplexity(found["perplexity"], found["tokens"], found["window"])

    exact = result(point)
    same = compensation is None and exported.keep == point.keep
    quality = Quality(
        point=exact,
        exported=exact if same else result(exported, compensation),
        data=Path(data).name if Path(data).exists() else data,
        dtype=str(model.dtype).removeprefix("torch."),
        compensated=compensation is not None,
    )
    return quality, compensation


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
    check_request(compensation, sparsities)
    if push_to_hub is not None:
        check_push(push_to_hub, private)
    with export_place(Path(out)) as place:
        trajectory = Trajectory.load(run)
        milestones = _milestones(trajectory, sparsities, compensation, device, together)
        base, source = _base_of(trajectory, device)
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


def _base_of(trajectory: Trajectory, device: str) -> tuple[Any, Path | None]:
    """The base model of a run in its own dtype, and its folder or file if it has one."""
    base = trajectory.load_base(device=device, dtype="auto")
    return base, base_folder(str(trajectory.base_model["path"]))
