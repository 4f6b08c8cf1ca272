"""How an evaluation fits where the layers of its model lie in host memory, planned before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gisp.compensation import CompensationRequest
from gisp.compensation.apply import calibration_sequences
from gisp.compensation.demand import COMPENSATING
from gisp.compensation.demand import demand as compensation_demand
from gisp.data import Sequences
from gisp.data.held_out import stored_run_text
from gisp.errors import GispError
from gisp.evaluate.data import Measure
from gisp.export.load import register_models
from gisp.export.nested.place import is_nested
from gisp.export.spec import PrunedSpec
from gisp.model.load import resolve_device, resolve_dtype, skeleton
from gisp.model.structures import ModelMap
from gisp.offload.plan import Advice, Demand, Plan
from gisp.run.resources.base import BasePlace
from gisp.run.resources.placement import weights_of
from gisp.run.trajectory import Trajectory
from gisp.target.check import is_run

EVALUATING = Advice(device="give a smaller --batch-size or --window, or more --gpu-memory", host="free some")


@dataclass(frozen=True)
class Outline:
    """The shapes of what a path names, dense if it is a run, without memory for its weights.

    Attributes:
        model: a causal language model.
        source: folder or name its tokenizer is read from.
        of_run: the run and its structure map, ``None`` for a model.
    """

    model: Any
    source: str
    of_run: tuple[Trajectory, ModelMap] | None = None

    @classmethod
    def of(cls, target: str, place: BasePlace, dtype: str | None) -> Outline:
        """The outline of a model, an export or a run.

        Raises:
            GispError: nothing usable there, or what cannot have its layers in host memory.
        """
        if is_run(target):
            trajectory = Trajectory.load(target)
            model_map = place.outline(trajectory, dtype)
            return cls(model_map.model, str(trajectory.base_model["path"]), (trajectory, model_map))
        if is_nested(target):
            raise GispError(f"--offload takes a model or a run, {target} is a nested checkpoint: leave it out")
        register_models()
        model = skeleton(target, resolve_dtype(dtype, resolve_device(place.device)))
        if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
            kind = getattr(model.config, "model_type", type(model).__name__)
            raise GispError(f"model type {kind!r} has no decoder layers at model.layers: leave --offload out")
        return cls(model, target)

    def plan(
        self,
        place: BasePlace,
        measure: Measure,
        request: CompensationRequest | None,
        sparsities: Iterable[float | None],
    ) -> tuple[Plan, Sequences | None]:
        """The plan, told to whoever hears of progress, and the data of a compensation.

        Args:
            measure: what is measured, prepared.
            sparsities: points of a run that are compensated, ``None`` for its end.

        Raises:
            GispError: it does not fit, or data that cannot be read.
        """
        device = resolve_device(place.device)
        asked, calibration, advice = weights_of(self.model), None, EVALUATING
        if request is not None and self.of_run is not None:
            trajectory, model_map = self.of_run
            calibration = calibration_sequences(model_map, request.calibration, self.source)
            run_text, options = stored_run_text(trajectory.held_out), request.options
            for step in {trajectory.step_for(sparsity) for sparsity in sparsities} - {0}:
                keep = PrunedSpec.at(trajectory, step).keep
                asked = _most(asked, compensation_demand(model_map, keep, options, calibration, device, run_text))
        working = measure.working(self.model, device)
        if asked.working > working:
            advice = COMPENSATING
        return place.plan(replace(asked, working=max(asked.working, working)), advice), calibration


def _most(one: Demand, other: Demand) -> Demand:
    """What either of two pieces of work on the same weights asks of memory."""
    names = ("working", "inputs", "beside")
    return replace(one, **{name: max(getattr(one, name), getattr(other, name)) for name in names})
