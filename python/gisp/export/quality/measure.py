"""Perplexity of a point of a run, and of what rounding and compensation make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from gisp.compensation import Compensation, CompensationRequest, fit_compensation, fold_into_pruned
from gisp.evaluate import EvalOptions, Perplexity
from gisp.evaluate.data import prepare
from gisp.export.quality.plans import UNPLANNED, Plans
from gisp.export.sizes.options import FORMATS
from gisp.export.spec import PrunedSpec
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.run.resources.base import BasePlace
from gisp.run.trajectory import Trajectory

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


def measure_quality(
    trajectory: Trajectory,
    point: PrunedSpec,
    rounded: Callable[[nn.Module, PrunedSpec], PrunedSpec],
    data: str | None,
    *,
    window: int | None,
    place: BasePlace,
    plans: Plans = UNPLANNED,
    request: CompensationRequest | None = None,
    format: str = "hf",
) -> tuple[Quality | None, Compensation | None]:
    """Perplexity of a point of a run and of what rounding and compensation make of it, measured as ``gisp eval`` does.

    Args:
        rounded: the exported spec, from the dense base model and the point.
        data: evaluation data, as for ``gisp eval``; None to measure nothing.
        place, plans: where the base model lies.
        request: compensation of the exported spec, fitted in the dtype of the run.
        format: of the export, which says what a compensation may change.

    Raises:
        GispError: the data cannot be read, a loss is NaN, or the format cannot hold the compensation.
    """
    model = place.load(trajectory, plan=plans.measuring)
    model_map = map_model(model)
    source = str(trajectory.base_model["path"])
    # Data that cannot be read is found before anything costly.
    measure = plans.measure
    if data is not None and measure is None:
        measure = prepare(data, EvalOptions(window=window), model, source)
    exported = rounded(model, point)
    compensation = None
    if request is not None:
        options = request.for_format(format, model_map, adds_biases=FORMATS[format].adds_biases)
        calibration = plans.calibration or request.calibration
        compensation = fit_compensation(model_map, exported.keep, calibration, options, tokenizer_from=source)
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
