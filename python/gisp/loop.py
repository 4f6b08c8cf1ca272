"""The pruning loop: score, smooth, select, shrink, record; paper Algorithm 1 with physical removal."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gisp.config import OFFICIAL_RATIO, PLACE_OPTIONS, PruneConfig, make_config
from gisp.data import Sequences, load_sequences
from gisp.engine import Engine
from gisp.errors import GispError
from gisp.metrics import PhaseClock, score_histogram
from gisp.model_io import check_model_path, load_dense, resolve_device, resolve_dtype
from gisp.runfolder import RunFolder
from gisp.schedule import parameter_target, structure_ratio
from gisp.select import Choice, Selector
from gisp.shrink import ShrinkableModel
from gisp.structures import ModelMap, fingerprint, first_bad_parameter, map_model, protected_layers
from gisp.trajectory import StepRecord, Trajectory, move_to

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
        **options: see :class:`gisp.config.PruneConfig`.

    Returns:
        The trajectory; its ``model`` is the pruned model.

    Raises:
        GispError: bad input or an impossible request, before anything is written.
    """
    config = make_config(**options)
    folder = RunFolder(Path(out)) if out is not None else None
    resuming = folder.check_free(resume) if folder else False
    dense, path = _dense_model(model, config)
    model_map = map_model(dense)
    sequences = data
    if not isinstance(data, Sequences):
        sequences = load_sequences(
            data,
            vocab_size=model_map.vocab_size,
            seq_len=config.seq_len,
            tokenizer_from=path or str(getattr(dense, "name_or_path", "")) or None,
            objective=config.objective,
        )
    sequences = sequences.first(config.samples)
    loop = PruningLoop(model_map, sequences, config, _spec_name(data), path)
    if folder and resuming:
        loop.restore(Trajectory.load(folder.path), folder)
    return loop.run(folder, on_step)


def _dense_model(model: nn.Module | str | Path, config: PruneConfig) -> tuple[Any, str]:
    """The model to prune and the path a later session finds it at (empty for a model in memory)."""
    if isinstance(model, nn.Module):
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

    def __init__(self, model_map: ModelMap, data: Sequences, config: PruneConfig, spec: str, base_path: str) -> None:
        self.map = model_map
        self.config = config
        self.selector = Selector(
            model_map,
            norm=str(config.norm),
            protected=protected_layers(len(model_map.layers), config.protect_first, config.protect_last),
            align=int(config.align or 1),
            keep_minimum=bool(config.keep_minimum),
        )
        self._check_reach()
        self.engine = Engine(
            model_map.model,
            data,
            kind=str(config.engine),
            batch_size=config.batch_size,
            batch_tokens=config.batch_tokens,
            vocab_size=model_map.vocab_size,
            seed=config.seed,
        )
        base = {"path": base_path, "fingerprint": fingerprint(model_map.model), **model_map.describe()}
        self.shrinkable = ShrinkableModel(model_map)
        self.average: dict[str, torch.Tensor] = {}
        counts = {group.name: group.count for group in model_map.groups}
        self.trajectory = Trajectory(
            removed_at={name: torch.zeros(count, dtype=torch.int32) for name, count in counts.items()},
            base_model=base,
            config=config.to_dict(),
            data={"spec": spec, "sequences": len(data), "sha256": data.digest()},
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
            if name not in PLACE_OPTIONS and done.config.get(name) != value:
                raise GispError(
                    f"{folder.path} was made with {name} {done.config.get(name)}, not {value}: "
                    "resume with the same options or give another --out"
                )
        self.average = {
            name: tensor.to(next(self.map.model.parameters()).device)
            for name, tensor in folder.load_state(len(done.steps)).items()
        }
        self.trajectory.steps = done.steps
        self.trajectory.removed_at = done.removed_at
        self.trajectory.complete = done.complete
        for step in range(1, len(done.steps) + 1):
            removed = {name: index.numpy() for name, index in done.removal(step).items()}
            self.selector.apply(Choice(removed, 0, None))
        move_to(self.shrinkable, self.trajectory, len(done.steps))

    def run(self, folder: RunFolder | None, on_step: OnStep | None) -> Trajectory:
        """All steps that are left."""
        trajectory = self.trajectory
        steps = int(self.config.steps or 1)
        written = 0.0
        while not trajectory.complete:
            clock = PhaseClock(next(self.map.model.parameters()).device)
            step = len(trajectory.steps) + 1
            record, metrics = self._step(step, steps, clock)
            trajectory.steps.append(record)
            trajectory.complete = step == steps or self._reached(record)
            if folder:
                # Its own writing time a step cannot write down; it carries the previous step's.
                clock.seconds["write"] = written
                folder.commit(trajectory, {**metrics, "seconds": clock.seconds}, self.average)
                written = clock.mark("write")
            if on_step:
                on_step(record, steps)
        return trajectory

    def _step(self, step: int, steps: int, clock: PhaseClock) -> tuple[StepRecord, dict[str, Any]]:
        scored = self.engine.score(step, self._live_groups())
        clock.mark("forward_backward")
        normalised = self.selector.normalise(self._smooth(scored.scores, step))
        target, choice = self._select(normalised, step, steps)
        histogram = score_histogram(normalised, self.selector.blocks)
        self.selector.apply(choice)
        clock.mark("select")
        removal = {name: torch.from_numpy(index) for name, index in choice.removed.items()}
        for name, index in removal.items():
            self.trajectory.removed_at[name][index] = step
        self.shrinkable.remove(removal)
        clock.mark("compact")
        removed = self.selector.removed_parameters
        record = StepRecord(
            step=step,
            sparsity=removed / self.map.decoder_parameters,
            target=target,
            model_sparsity=removed / self.map.parameters,
            removed_parameters=removed,
            heads_removed=self._gone("heads"),
            channels_removed=self._gone("channels"),
            loss=scored.loss,
            tokens=scored.tokens,
            seconds=clock.total(),
            kv_bytes_per_token=self._kv_bytes(),
        )
        metrics = {
            "step": step,
            "loss": scored.loss,
            "sparsity": record.sparsity,
            "threshold": choice.threshold,
            "tokens_per_second": scored.tokens / max(clock.seconds["forward_backward"], 1e-9),
            "score_histogram": histogram,
            "peak_bytes": clock.peak_bytes(),
        }
        return record, metrics

    def _select(self, normalised: np.ndarray, step: int, steps: int) -> tuple[float, Choice]:
        if self.config.schedule == "structures":
            ratio = structure_ratio(float(self.config.ratio or OFFICIAL_RATIO), step, steps)
            return ratio, self.selector.below_threshold(normalised, ratio)
        sparsity = float(self.config.sparsity or 0)
        parameters = self.map.decoder_parameters
        allowed = parameter_target(sparsity, step, steps, parameters)
        return allowed / parameters, self.selector.within_target(normalised, allowed)

    def _live_groups(self) -> list[Any]:
        protected = {block.name for block in self.selector.blocks if block.protected}
        return [g for g in self.map.groups if g.name not in protected and self.shrinkable.kept(g.name)]

    def _smooth(self, scores: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """Scores in original numbering, averaged over steps with weight ``ema`` for the past."""
        full = {}
        for name, values in scores.items():
            spread = torch.zeros(len(self.trajectory.removed_at[name]), device=values.device)
            spread[self.shrinkable.order(name).to(values.device)] = values
            full[name] = spread
        weight = float(self.config.ema or 0)
        if weight == 0:
            return full
        for name, values in full.items():
            past = self.average.get(name, torch.zeros_like(values))
            self.average[name] = weight * past + (1 - weight) * values
        # The start from zero is divided out, so that early thresholds are comparable with late ones.
        return {name: self.average[name] / (1 - weight**step) for name in full}

    def _check_reach(self) -> None:
        config, selector = self.config, self.selector
        where = f"with {int(selector.protected.sum())} of {selector.size} structures protected"
        if config.schedule == "structures":
            ratio = float(config.ratio or OFFICIAL_RATIO)
            if selector.out_of_reach(ratio):
                raise GispError(f"ratio {ratio} is out of reach {where}: lower --ratio or protect fewer layers")
        most = selector.removable_parameters / self.map.decoder_parameters
        if float(config.sparsity or 0) > most:
            raise GispError(
                f"sparsity {config.sparsity} is out of reach: at most {most:.4f} {where}, "
                "lower --sparsity or protect fewer layers"
            )

    def _reached(self, record: StepRecord) -> bool:
        """Whether a ratio schedule has passed the sparsity it was to stop at."""
        goal = self.config.sparsity
        return self.config.schedule == "structures" and goal is not None and record.sparsity >= goal

    def _gone(self, kind: str) -> int:
        at = self.trajectory.removed_at
        return sum(int((at[name] > 0).sum()) for name in at if name.endswith(kind))

    def _kv_bytes(self) -> int:
        """Key and value bytes per token; a key/value head without any query head left is not counted."""
        groups = self.map.num_heads // self.map.num_kv_heads
        heads = sum(len(torch.unique(self.shrinkable.order(m.heads.name) // groups)) for m in self.map.layers)
        return 2 * heads * self.map.head_dim * next(self.map.model.parameters()).element_size()


def _spec_name(data: Any) -> str:
    return "tokens in memory" if isinstance(data, (torch.Tensor, Sequences)) else str(data)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("gisp-kernels", "torch", "transformers", "triton", "safetensors", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
