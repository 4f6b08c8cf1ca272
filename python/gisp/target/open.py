"""Whatever a path names, in memory: a dense or exported model, a nested checkpoint or a run, at any of its points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gisp.compensation import CompensationRequest, compensate
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.export.load import load
from gisp.export.nested.files import NestedFiles
from gisp.export.nested.place import is_nested
from gisp.export.sizes.stored import StoredSize, stored_sizes
from gisp.model.attention import kv_bytes_per_token
from gisp.model.load import resolve_device, resolve_dtype
from gisp.model.structures import channels_name, heads_name
from gisp.offload.place import place as place_layers
from gisp.offload.plan import Plan
from gisp.run.resources.base import BasePlace
from gisp.run.staged_base import staged_base
from gisp.run.trajectory import Trajectory, move_to
from gisp.select.schedule import nearest_step
from gisp.stages.group import Stages
from gisp.stages.placement import Placement
from gisp.target.check import check_target, is_run


@dataclass(frozen=True)
class Point:
    """A size of a model.

    Attributes:
        sparsity: removed / all parameters of the decoder layers.
        model_sparsity: removed / all parameters of the model.
        step: of the run; ``None`` for a model that is not part of one.
    """

    sparsity: float
    model_sparsity: float
    step: int | None


class Target:
    """One model in memory, of one size unless a subclass moves it from point to point.

    Attributes:
        model: the causal language model; the same object at every point.
        source: folder or name its tokenizer is read from.
        point: where the model is.
        points: dense first, then every step; empty for a model of one size.
        goal: sparsity that names the last point, see :func:`gisp.select.schedule.goal_of`.
        trajectory: the run it is a point of, if it is of one.
        placement: which layers lie where, if several processes hold them.
    """

    points: Sequence[Point] = ()
    goal: float | None = None
    trajectory: Trajectory | None = None
    placement: Placement | None = None

    def __init__(self, model: Any, source: str, point: Point) -> None:
        self.model, self.source, self.point = model, source, point

    def move(self, point: Point) -> None:
        """Prune or restore the model in place.

        Raises:
            GispError: it has one size.
        """
        raise GispError(f"{self.source} holds one size: give a run or a nested checkpoint")

    def compensate(self, request: CompensationRequest, calibration: Sequences | None = None) -> None:
        """Compensate the model where it is; moving takes that back.

        Args:
            calibration: data of the request where it was read already.

        Raises:
            GispError: it is of no run.
        """
        raise GispError(f"--compensate {request.options.method} needs a run folder, {self.source} is none")

    def nearest(self, sparsity: float) -> Point:
        """The point nearest to a sparsity, the smaller of two equally near.

        Raises:
            GispError: see :func:`gisp.select.schedule.nearest_step`.
        """
        reached = [point.sparsity for point in self.points]
        return self.points[nearest_step(reached, sparsity, "--sparsities holds", self.goal)]

    def describe(self) -> dict[str, Any]:
        """``sparsity, model_sparsity, step, parameters, kv_bytes_per_token`` of the model as it is.

        ``compensation`` says what was done to its weights, if anything.
        """
        # An export and a nested checkpoint say it themselves.
        told = (getattr(self.model.config, "gisp", None) or {}).get("compensation")
        return {
            "sparsity": self.point.sparsity,
            "model_sparsity": self.point.model_sparsity,
            "step": self.point.step,
            "parameters": parameters(self.model),
            "kv_bytes_per_token": kv_bytes_per_token(self.model),
            **({"compensation": told} if told else {}),
        }


class NestedTarget(Target):
    """A nested checkpoint, which resizes itself."""

    def __init__(self, model: Any, folder: str) -> None:
        super().__init__(model, folder, replace(_told_point(model), step=int(model.config.gisp["step"])))
        files = NestedFiles.open(folder)
        steps = files.record["steps"]
        self.points = [
            Point(float(s["sparsity"]), float(s["model_sparsity"]), number) for number, s in enumerate(steps)
        ]
        self.goal = files.goal

    def move(self, point: Point) -> None:
        """As of :class:`Target`."""
        self.model.resize(point.sparsity)
        self.point = point


class RunTarget(Target):
    """The base model of a run, pruned along it."""

    def __init__(self, model: Any, trajectory: Trajectory, step: int, placement: Placement | None = None) -> None:
        self.points = [
            Point(trajectory.sparsity_at(t), trajectory.model_sparsity_at(t), t)
            for t in range(len(trajectory.steps) + 1)
        ]
        super().__init__(model, str(trajectory.base_model["path"]), self.points[step])
        self.goal, self.trajectory, self.placement = trajectory.goal, trajectory, placement
        self._run, self._shrinkable = trajectory, trajectory.shrinkable(model)
        self.move(self.point)

    def move(self, point: Point) -> None:
        """As of :class:`Target`."""
        move_to(self._shrinkable, self._run, int(point.step or 0))
        self.point = point
        self._done: dict[str, Any] = {}
        # Biases a compensation adds.
        self._added = 0

    def compensate(self, request: CompensationRequest, calibration: Sequences | None = None) -> None:
        """As of :class:`Target`; the dense model stays as it is."""
        if self.point.step:
            before = parameters(self.model)
            done = compensate(self.model, calibration or request.calibration, **asdict(request.options))
            self._added = parameters(self.model) - before
            self._done = {"compensation": request.describe(done)}
            if done.against:
                self._done["held_against"] = [asdict(text) for text in done.against]

    def describe(self) -> dict[str, Any]:
        """As of :class:`Target`, with the parameters and the cache that an ``hf`` export of the point stores.

        The pruned model in memory reads a key/value head by any number of query heads, an export does not
        (:mod:`gisp.export.sizes.stored`). ``held_against`` lists ``name, texts, tokens`` of text that limited the
        compensation.
        """
        size = stored_at(self._run, [int(self.point.step or 0)])[0]
        return {
            **super().describe(),
            "parameters": size.parameters + self._added,
            "kv_bytes_per_token": size.kv_bytes_per_token(next(self.model.parameters()).element_size()),
            **self._done,
        }


def open_target(
    target: str,
    *,
    sparsity: float | None = None,
    place: BasePlace,
    dtype: str | None = None,
    plan: Plan | None = None,
    stages: Stages | None = None,
) -> Target:
    """The model a path names, at one sparsity.

    Args:
        target: dense model or exported folder, hub name, nested checkpoint or run folder.
        sparsity: point of a run or nested checkpoint (``None`` = its end); only for these.
        place: where the model computes.
        plan: where layers lie, if ``place`` leaves them in host memory.
        stages: of a run alone: processes that each hold a part of the layers; the others lie on ``meta``.

    Raises:
        GispError: nothing usable there, or anything but a run in stages.
    """
    if is_run(target):
        return _open_run(Trajectory.load(target), sparsity, place, dtype, plan, stages)
    if stages is not None:
        raise GispError(f"--stages {stages.count} takes a run, {target} is none: leave it out, or give --offload")
    check_target(target, sparsity)
    device = resolve_device(place.device)
    kind = resolve_dtype(dtype, device)
    model = load(target, sparsity=sparsity, device="cpu" if place.offload else str(device), dtype=kind)
    if plan is not None:
        place_layers(model, plan.streamed, device, **plan.places)
    return NestedTarget(model, target) if is_nested(target) else Target(model, target, _told_point(model))


def _open_run(
    trajectory: Trajectory,
    sparsity: float | None,
    place: BasePlace,
    dtype: str | None,
    plan: Plan | None,
    stages: Stages | None,
) -> RunTarget:
    step, placement = trajectory.step_for(sparsity), None
    if stages is not None:
        device = resolve_device(place.device)
        kind = trajectory.dtype_on(device, dtype)
        model, placement = staged_base(trajectory, stages, device, kind if isinstance(kind, torch.dtype) else None)
    else:
        model = place.load(trajectory, dtype=dtype, plan=plan)
    return RunTarget(model, trajectory, step, placement)


def _told_point(model: Any) -> Point:
    """The size that a model's configuration tells, dense where it tells none."""
    record = getattr(model.config, "gisp", None) or {}
    return Point(float(record.get("sparsity", 0.0)), float(record.get("model_sparsity", 0.0)), None)


def stored_at(trajectory: Trajectory, steps: Sequence[int]) -> list[StoredSize]:
    """What exports of a run's steps store."""
    heads, channels = (
        [trajectory.removed_at[name(layer)].numpy() for layer in range(trajectory.layers)]
        for name in (heads_name, channels_name)
    )
    return stored_sizes(trajectory.base_model, heads, channels, steps)


def parameters(model: Any) -> int:
    """Parameters of a model, tied ones once."""
    return sum(p.numel() for p in model.parameters())
