"""Perplexity of a point of a run, and of what rounding and compensation make of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gisp.compensation import Compensation, fit_compensation, fold_into_pruned
from gisp.evaluate import EvalOptions, Perplexity
from gisp.evaluate.data import prepare
from gisp.export.quality.plans import UNPLANNED, Plans
from gisp.export.quality.wanted import Wanted
from gisp.export.spec import PrunedSpec
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
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
    trajectory: Trajectory, wanted: Wanted, point: PrunedSpec, plans: Plans = UNPLANNED
) -> tuple[Quality | None, Compensation | None]:
    """Perplexity of a point of a run and of what rounding and compensation make of it, measured as ``gisp eval`` does.

    Args:
        point: of the run, as it is before sizes are rounded.
        plans: where the base model lies.

    Returns:
        The perplexities, ``None`` where no data are given, and the compensation, ``None`` where none is wanted.

    Raises:
        GispError: the data cannot be read, a loss is NaN, or the format cannot hold the compensation.
    """
    data, request = wanted.data, wanted.compensation
    model = wanted.place.load(trajectory, plan=plans.measuring)
    model_map = map_model(model)
    source = str(trajectory.base_model["path"])
    # Data that cannot be read is found before anything costly.
    measure = plans.measure
    if data is not None and measure is None:
        measure = prepare(data, EvalOptions(window=wanted.window), model, source)
    exported = wanted.rounded(model, point)
    compensation = None
    if request is not None:
        options = wanted.compensation_options(request, model_map)
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
