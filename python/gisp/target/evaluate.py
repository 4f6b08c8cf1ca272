"""Evaluating what a path names: at one sparsity, or along all sparsities of a run with one model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gisp.compensation import CompensationRequest
from gisp.config.evaluation import EvalOptions, LmEvalTasks, options_of
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.evaluate.data import Measure
from gisp.evaluate.model import check_given, prepare_measures
from gisp.evaluate.staged_loss import StagedLoss
from gisp.files import as_text
from gisp.model.structures import fingerprint
from gisp.progress import reporting
from gisp.replicas.agreement import agree, machine
from gisp.replicas.group import Replicas
from gisp.replicas.sharing import sharing
from gisp.run.record import library_versions
from gisp.run.resources.base import BasePlace
from gisp.select.schedule import check_several
from gisp.stages.group import Stages
from gisp.stages.rules import check_count
from gisp.target.check import check_along, check_stages, is_run
from gisp.target.open import Target, open_target
from gisp.target.plan import Outline
from gisp.target.record import EvaluationRecorder


@reporting(None)
def evaluate_target(
    target: str | Path,
    data: str | Path | None = None,
    *,
    sparsity: float | None = None,
    window: int | None = None,
    options: EvalOptions | None = None,
    lm_eval: LmEvalTasks | None = None,
    device: str = "auto",
    dtype: str | None = None,
    compensation: CompensationRequest | None = None,
    replicas: Replicas | None = None,
    offload: bool = False,
    gpu_memory: str | None = None,
    stages: int = 1,
) -> dict[str, Any]:
    """Measure one model. Figures of a run are also recorded in its folder.

    Args:
        target: dense model or exported folder, hub name, nested checkpoint or run folder.
        data: evaluation data; its rows decide what is measured (:func:`gisp.evaluate.data.prepare`).
        sparsity: only for a run or a nested checkpoint: which size to measure; ``None`` is the end of the run.
        window: short for ``options=EvalOptions(window=...)``.
        options: how to evaluate.
        lm_eval: lm-eval tasks to run, in addition to ``data`` or instead.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        dtype: ``bfloat16`` or ``float32``; ``None``: that of the run or of the device.
        compensation: only for a run: a compensation of the pruned model before it is measured.
        replicas: processes that share the work, each with the whole model; ``None``: this one alone. The figures are
            the same, except that a compensation is summed, and lm-eval tasks are batched, in slices.
        offload: keep the decoder layers in host memory and copy them to the device in turn. Memory is planned before
            the model is loaded. Not for nested checkpoints, nor with compensations that train or add biases.
        gpu_memory: only with ``offload``: the most GPU memory to take, as ``24GB``.
        stages: only for the perplexity of a run: parts that its layers are split into, as many as there are
            ``replicas``.

    Returns:
        ``sparsity, model_sparsity, step, parameters, kv_bytes_per_token, data`` and what was measured.

    Raises:
        GispError: there is no such target, data cannot be read, options do not belong together, a model of one size is
            given a sparsity, or a model does not fit.
    """
    how, place = options_of(options, window), BasePlace(device, offload, gpu_memory)
    asked = _Asked(_path(target), _spec(data), how, lm_eval, compensation, place, dtype)
    asked.check(stages)
    with _processes(replicas, stages) as (sharers, of_stages):
        opened = asked.open([sparsity], sharers, of_stages)
        opened.compensate()
        point = {**opened.measure(), **opened.target.describe(), "data": asked.data}
        opened.record(point)
        return point


@reporting(None)
def evaluate_along(
    target: str | Path,
    data: str | Path | None = None,
    *,
    sparsities: Sequence[float],
    window: int | None = None,
    options: EvalOptions | None = None,
    lm_eval: LmEvalTasks | None = None,
    device: str = "auto",
    dtype: str | None = None,
    compensation: CompensationRequest | None = None,
    on_point: Callable[[dict[str, Any]], None] | None = None,
    replicas: Replicas | None = None,
    offload: bool = False,
    gpu_memory: str | None = None,
    stages: int = 1,
) -> dict[str, Any]:
    """Measure the dense model and several sparsities of a run or a nested checkpoint, with one model in memory.

    The figures of a run are recorded in its folder as soon as a sparsity is measured.

    Args:
        sparsities: sparsities to measure; of each the nearest step is taken, and every step only once.
        compensation: only for a run: done again at every sparsity.
        on_point: function that is called with the figures of each sparsity as soon as they are measured.

    All other arguments are those of :func:`evaluate_target`.

    Returns:
        ``target, data`` and ``points``: what :func:`evaluate_target` returns, dense first, then by sparsity.

    Raises:
        GispError: the target has one size only, a sparsity is beyond the run, or as :func:`evaluate_target`.
    """
    how, place = options_of(options, window), BasePlace(device, offload, gpu_memory)
    asked = _Asked(_path(target), _spec(data), how, lm_eval, compensation, place, dtype)
    asked.check(stages)
    check_several(sparsities)
    if not sparsities:
        raise GispError("--sparsities is empty: give numbers with commas between them")
    check_along(asked.target, sparsities)
    with _processes(replicas, stages) as (sharers, of_stages):
        opened = asked.open([0.0, *sparsities], sharers, of_stages)
        moved = opened.target
        wanted = {0: moved.points[0]} | {p.step or 0: p for p in map(moved.nearest, sparsities)}
        points = []
        for _, point in sorted(wanted.items()):
            moved.move(point)
            opened.compensate()
            points.append({**moved.describe(), **opened.measure()})
            opened.record(points[-1])
            if on_point is not None:
                on_point(points[-1])
    return {"target": asked.target, "data": asked.data, "points": points}


@dataclass(frozen=True)
class _Asked:
    """What to measure of what, and where; arguments as of :func:`evaluate_target`."""

    target: str
    data: str | None
    options: EvalOptions
    lm_eval: LmEvalTasks | None
    compensation: CompensationRequest | None
    place: BasePlace
    dtype: str | None

    def check(self, stages: int) -> None:
        """Refuse what does not go together, before anything is loaded.

        Raises:
            GispError: it does not, or nothing is to be measured.
        """
        check_count(stages)
        request, offload = self.compensation, self.place.offload
        check_given(self.data, self.lm_eval)
        if request is not None and offload:
            request.options.check_streamed()
        if request is not None and not is_run(self.target):
            raise GispError(f"--compensate {request.options.method} needs a run folder, {self.target} is none")
        check_stages(stages, self.lm_eval, request, offload, self.options.generate)

    def open(self, sparsities: Sequence[float | None], sharers: Replicas, stages: Stages | None) -> _Opened:
        """The model at the first of these points, and what measures all of them."""
        measure = plan = calibration = None
        if self.place.offload:
            outline = Outline.of(self.target, self.place, self.dtype)
            measure = self._measure(outline.model, outline.source)
            plan, calibration = outline.plan(self.place, measure, self.compensation, sparsities)
            # Others look at memory that is free before this process takes some.
            sharers.exchange(b"")
        opened = open_target(
            self.target, sparsity=sparsities[0], place=self.place, dtype=self.dtype, plan=plan, stages=stages
        )
        _agree(sharers, opened, self.options, self.lm_eval)
        recorder = self._recorder(opened) if sharers.first else None
        if measure is None:
            parts = StagedLoss(opened.model, stages, opened.placement) if stages and opened.placement else None
            measure = self._measure(opened.model, opened.source, parts)
        return _Opened(opened, measure, recorder, self.compensation, calibration)

    def _measure(self, model: Any, source: str, parts: StagedLoss | None = None) -> Measure:
        return prepare_measures(self.data, self.lm_eval, self.options, model, source, parts)

    def _recorder(self, opened: Target) -> EvaluationRecorder | None:
        """What records the figures of a run; a target that is none has no place for them."""
        if opened.trajectory is None:
            return None
        dtype = str(opened.model.dtype).removeprefix("torch.")
        return EvaluationRecorder(Path(self.target), opened.trajectory, self.data, self.options, self.lm_eval, dtype)


@dataclass(frozen=True)
class _Opened:
    """A model in memory, and what is done at every point of it."""

    target: Target
    measures: Measure
    recorder: EvaluationRecorder | None
    compensation: CompensationRequest | None
    calibration: Sequences | None

    def compensate(self) -> None:
        if self.compensation is not None:
            self.target.compensate(self.compensation, self.calibration)

    def measure(self) -> dict[str, Any]:
        return self.measures(self.target.model)

    def record(self, point: dict[str, Any]) -> None:
        if self.recorder is not None:
            self.recorder.add(point)


def _path(target: object) -> str:
    """What a target is named by.

    Raises:
        GispError: it is no path, or a model in memory.
    """
    if isinstance(target, nn.Module):
        kind = type(target).__name__
        raise GispError(f"target is a {kind} in memory: gisp.evaluate.evaluate_model(model, data) measures it")
    return as_text(target, "target")


def _spec(data: object) -> str | None:
    return None if data is None else as_text(data, "data")


@contextmanager
def _processes(replicas: Replicas | None, stages: int) -> Iterator[tuple[Replicas, Stages | None]]:
    """Processes that share the evaluation of one model each, or pass one model's states on to one another."""
    if stages == 1:
        with sharing(replicas) as sharers:
            yield sharers, None
        return
    processes = replicas or Replicas()
    of_stages = Stages(processes, stages)
    if of_stages.replicas > 1:
        raise GispError(f"--stages {stages} takes as many processes, {processes.size} are here: start {stages}")
    with processes.watched(), nullcontext() if processes.first else reporting(False), of_stages.connected():
        yield processes, of_stages


def _agree(sharers: Replicas, opened: Target, options: EvalOptions, lm_eval: LmEvalTasks | None) -> None:
    """Require that all processes measure the same in the same way."""
    if sharers.size == 1:
        return
    asked = {"": options, "lm_eval_": lm_eval}
    given = {f"option {of}{n}": str(v) for of, o in asked.items() if o is not None for n, v in asdict(o).items()}
    weight = next(p for p in opened.model.parameters() if not p.is_meta)
    # Of a model over stages the whole was compared with the run.
    model = {} if opened.placement else {"model": fingerprint(opened.model)}
    agree(
        sharers,
        {
            **machine(weight.device, library_versions()),
            **given,
            "sparsity": opened.point.sparsity,
            **model,
            "weights of": str(weight.dtype),
        },
    )
