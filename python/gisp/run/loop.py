"""The pruning loop: score, smooth, select, shrink, record; paper Algorithm 1 with physical removal."""

from __future__ import annotations

import dataclasses
import math
import platform
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gisp.config.options import OFFICIAL_RATIO, PLACE_OPTIONS, PruneConfig, make_config, recorded
from gisp.data import Sequences, load_sequences
from gisp.errors import GispError
from gisp.model.load import check_model_path, load_dense, resolve_device, resolve_dtype
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import ModelMap, fingerprint, first_bad_parameter, map_model, protected_layers
from gisp.run.average import ScoreAverage, in_original_numbering
from gisp.run.folder import RunFolder
from gisp.run.metrics import PhaseClock, histogram_record, score_histogram
from gisp.run.step_writer import StepWriter
from gisp.run.trajectory import StepRecord, Trajectory, move_to
from gisp.run.transfer import Transfer
from gisp.score.base import make_scorer
from gisp.score.context import Context
from gisp.score.objectives import SequenceLoss, check_built_in, objective_name
from gisp.score.questions import check_objective
from gisp.select.allocators import group_shares, layer_outliers
from gisp.select.schedule import parameter_target, structure_ratio
from gisp.select.selector import Ranking, Selection
from gisp.select.whole_layers import make_selector

OnStep = Callable[[StepRecord, int], None]


def prune(
    model: nn.Module | str | Path,
    data: Any,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    **options: Any,
) -> Trajectory:
    """Prune a model in place.

    Args:
        model: a dense causal language model, or the folder or hub name of one.
        data: calibration data: int tensor [N, S], a SPEC (see :func:`gisp.data.load_sequences`) or ``Sequences``.
        out: run folder to write after every step; none is written for ``None``.
        resume: continue the run in ``out`` if there is one; the result is the undisturbed run's.
        on_step: called with every new record and the number of steps of the schedule.
        **options: see :class:`gisp.config.options.PruneConfig`. ``objective`` may also be a loss of your own,
            ``loss(model, input_ids, labels) -> [B]`` (see ``gisp.score.objectives.SequenceLoss``); rows are read as for
            ``lm``, and the run records the function's qualified name. Second-order scores compare a first with a second
            power of it: they take it for a mean over the scored tokens, whatever it is.

    Returns:
        The trajectory; its ``model`` is the pruned model.

    Raises:
        GispError: bad input or an impossible request, before anything is written.
    """
    loss = options.get("objective")
    loss = loss if callable(loss) else None
    if loss is not None:
        options["objective"] = objective_name(loss)
    config = make_config(**options)
    if loss is None:
        check_built_in(config.objective)
    folder = RunFolder(Path(out)) if out is not None else None
    resuming = folder.check_free(resume) if folder else False
    dense, path = _dense_model(model, config)
    model_map = map_model(dense, config.gqa)
    if isinstance(data, Sequences):
        sequences = data.checked(model_map.vocab_size)
    else:
        sequences = load_sequences(
            data,
            vocab_size=model_map.vocab_size,
            seq_len=config.seq_len,
            tokenizer_from=path or str(getattr(dense, "name_or_path", "")) or None,
            objective="lm" if loss else config.objective,
            seed=config.seed,
        )
    sequences = check_objective(sequences.first(config.samples), config)
    loop = PruningLoop(model_map, sequences, config, _spec_name(data), path, loss)
    if folder and resuming:
        loop.restore(Trajectory.load(folder.path), folder)
    return loop.run(folder, on_step)


def _dense_model(model: nn.Module | str | Path, config: PruneConfig) -> tuple[Any, str]:
    """The model to prune and the path a later session finds it at (empty for a model in memory)."""
    if isinstance(model, nn.Module):
        if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
            warnings.warn(
                "the model is float16: gradients of large calibration sets underflow and blur the scores, "
                "load it in bfloat16 or float32",
                stacklevel=3,
            )
        previous = ShrinkableModel.of(model)
        if previous is not None and previous.history:
            raise GispError("this model is already pruned: take it back with its trajectory's at(0), or load it anew")
        map_model(model)
        bad = first_bad_parameter(model)
        if bad is not None:
            raise GispError(f"the model holds NaN or infinite weights in {bad}: give a sound model")
        return model, ""
    path = str(model)
    check_model_path(path)
    device = resolve_device(config.device)
    loaded = load_dense(path, device, resolve_dtype(config.dtype, device))
    return loaded, str(Path(path).resolve()) if Path(path).is_dir() else path


class PruningLoop:
    """State of one run between steps."""

    def __init__(
        self,
        model_map: ModelMap,
        data: Sequences,
        config: PruneConfig,
        spec: str,
        base_path: str,
        loss: SequenceLoss | None = None,
    ) -> None:
        self.map = model_map
        self.config = config
        protected = protected_layers(len(model_map.layers), config.protect_first, config.protect_last)
        self.selector = make_selector(config, model_map, protected)
        self.selector.check_reach(config, float(config.sparsity or 0))
        base = {"path": base_path, "fingerprint": fingerprint(model_map.model), **model_map.describe()}
        self.shrinkable = ShrinkableModel(model_map)
        context = Context(self.shrinkable, data, config, loss)
        self.scorer = make_scorer(context)
        self.selector.allocate(group_shares(config, self.selector, layer_outliers(context, self.selector)))
        self._open = {group.name for group in self.selector.groups if not group.protected}
        device = next(model_map.model.parameters()).device
        self.average = ScoreAverage(model_map.groups, self._open, float(config.ema or 0), device)
        self._device, self._transfer = device, Transfer(device)
        counts = {item.heads.name: model_map.num_heads for item in model_map.layers}
        counts |= {item.channels.name: model_map.intermediate_size for item in model_map.layers}
        self._removed_at = {name: np.zeros(count, dtype=np.int32) for name, count in counts.items()}
        self.trajectory = Trajectory(
            removed_at={name: torch.from_numpy(at) for name, at in self._removed_at.items()},
            base_model=base,
            config=config.to_dict(),
            data=_describe(data, spec),
            versions=_versions(),
            model=model_map.model,
        )

    def restore(self, done: Trajectory, folder: RunFolder) -> None:
        """Take up a run where it was cut.

        The weights are shrunk step by step as the run did it, so that every tensor is what it was, bit for bit.

        Raises:
            GispError: the run was made with other options, another model or other data.
        """
        for what, then, now in (
            ("model", done.base_model["fingerprint"], self.trajectory.base_model["fingerprint"]),
            ("data", done.data.get("sha256"), self.trajectory.data["sha256"]),
        ):
            if then != now:
                raise GispError(f"{folder.path} was made with another {what}: give the same or another --out")
        for name, value in self.trajectory.config.items():
            then = recorded(done.config, name)
            if name not in PLACE_OPTIONS and then != value:
                raise GispError(
                    f"{folder.path} was made with {name} {then}, not {value}: "
                    "resume with the same options or give another --out"
                )
        then, now = (
            [task["objective"] for task in data.get("tasks", ())] for data in (done.data, self.trajectory.data)
        )
        if then != now:
            raise GispError(
                f"{folder.path} was made with objectives {', '.join(then)} of its tasks, not {', '.join(now)}: "
                "resume with the same mixture or give another --out"
            )
        self.average.load(folder.load_state(len(done.steps)))
        self.trajectory.steps = done.steps
        self.trajectory.complete = done.complete
        for name, at in done.removed_at.items():
            self._removed_at[name][:] = at.numpy()
        for step in range(1, len(done.steps) + 1):
            self.selector.apply(*self.selector.given(done.removal(step)))
        move_to(self.shrinkable, self.trajectory, len(done.steps))

    def run(self, folder: RunFolder | None, on_step: OnStep | None) -> Trajectory:
        """All steps that are left."""
        trajectory = self.trajectory
        steps = int(self.config.steps or 1)
        writer = StepWriter(overlap=self._device.type == "cuda")
        try:
            while not trajectory.complete:
                clock = PhaseClock(self._device)
                step = len(trajectory.steps) + 1
                record, metrics, state = self._step(step, steps, clock, writer)
                trajectory.steps.append(record)
                trajectory.complete = step == steps or self._reached(record)
                if folder:
                    # Its own writing time a step cannot write down; it carries the previous step's.
                    clock.seconds["write"] = writer.held_up
                    metrics["seconds"] = clock.seconds
                    writer.take(partial(folder.commit, trajectory, metrics, state))
                if on_step:
                    on_step(record, steps)
        finally:
            writer.flush()
        return trajectory

    def _step(
        self, step: int, steps: int, clock: PhaseClock, writer: StepWriter
    ) -> tuple[StepRecord, dict[str, Any], dict[str, torch.Tensor]]:
        """One step: its record, its metrics and what a resumed run needs.

        A GPU is waited for once, with objective ``choice`` twice.
        """
        scored = self.scorer.score(step, self._live_groups())
        clock.mark("forward_backward")
        scores = in_original_numbering(scored.scores, self.shrinkable, len(self.selector.removed))
        ranking = self.selector.rank(self.average.update(scores, step))
        target, selection = self._select(ranking, step, steps)
        histogram = score_histogram(ranking, self.selector.first_channel)
        clock.mark("select")
        writer.flush()
        results = (scored.loss, scored.finite, selection.removed, selection.threshold, *histogram, self.average.average)
        loss, finite, removed, threshold, edges, counts, average = self._transfer.fetch(results)
        clock.settle()
        self._check_finite(step, float(loss), bool(finite))
        removal = self.selector.removal(removed, float(threshold))
        self.selector.apply(removal, selection)
        for name, index in removal.removed.items():
            self._removed_at[name][index.numpy()] = step
        self.shrinkable.remove(removal.removed)
        clock.mark("compact")
        record = self._record(step, target, float(loss), scored.tokens, clock.total())
        metrics = {
            "step": step,
            "loss": record.loss,
            "sparsity": record.sparsity,
            "threshold": removal.threshold,
            "tokens_per_second": scored.tokens / max(clock.seconds["forward_backward"], 1e-9),
            "score_histogram": histogram_record(edges, counts),
            "peak_bytes": clock.peak_bytes(),
        }
        return record, metrics, self.average.state(average)

    def _record(self, step: int, target: float, loss: float, tokens: int, seconds: float) -> StepRecord:
        removed = self.selector.removed_parameters
        heads, channels = np.split(self.selector.removed, [self.selector.head_structures])
        return StepRecord(
            step=step,
            sparsity=removed / self.map.decoder_parameters,
            target=target,
            model_sparsity=removed / self.map.parameters,
            removed_parameters=removed,
            heads_removed=int(np.count_nonzero(heads)) * self.map.heads_per_structure,
            channels_removed=int(np.count_nonzero(channels)),
            loss=loss,
            tokens=tokens,
            seconds=seconds,
            kv_bytes_per_token=self._kv_bytes(heads),
        )

    def _select(self, ranking: Ranking, step: int, steps: int) -> tuple[float, Selection]:
        if self.config.schedule == "structures":
            ratio = structure_ratio(float(self.config.ratio or OFFICIAL_RATIO), step, steps)
            return ratio, self.selector.below_threshold(ranking, ratio)
        sparsity = float(self.config.sparsity or 0)
        parameters = self.map.decoder_parameters
        allowed = parameter_target(sparsity, step, steps, parameters)
        return allowed / parameters, self.selector.within_target(ranking, allowed)

    def _live_groups(self) -> list[Any]:
        return [g for g in self.map.groups if g.name in self._open and self.shrinkable.kept(g.name)]

    @staticmethod
    def _check_finite(step: int, loss: float, scores: bool) -> None:
        if not math.isfinite(loss):
            raise GispError(f"the loss of step {step} is {loss}: check the weights and the data of this model")
        if not scores:
            raise GispError(f"scores of step {step} are not finite: use --dtype float32 or check the weights")

    def _reached(self, record: StepRecord) -> bool:
        """Whether a ratio schedule has passed the sparsity it was to stop at."""
        goal = self.config.sparsity
        return self.config.schedule == "structures" and goal is not None and record.sparsity >= goal

    def _kv_bytes(self, removed_heads: np.ndarray) -> int:
        """Key and value bytes per token; a key/value head without any query head left is not counted."""
        heads = int((~removed_heads.reshape(len(self.map.layers) * self.map.num_kv_heads, -1)).any(1).sum())
        return 2 * heads * self.map.head_dim * next(self.map.model.parameters()).element_size()


def _spec_name(data: Any) -> str:
    return "tokens in memory" if isinstance(data, (torch.Tensor, Sequences)) else str(data)


def _describe(data: Sequences, spec: str) -> dict[str, Any]:
    """What a run records of its data."""
    described: dict[str, Any] = {"spec": spec, "sequences": len(data), "sha256": data.digest()}
    if data.tasks:
        described["tasks"] = [dataclasses.asdict(task) for task in data.tasks]
    return described


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("gisp-kernels", "torch", "transformers", "triton", "safetensors", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
