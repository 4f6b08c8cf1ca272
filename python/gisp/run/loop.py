"""The pruning loop: score, smooth, select, shrink, record; paper Algorithm 1 with physical removal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gisp.config.options import OFFICIAL_RATIO, PLACE_OPTIONS, PruneConfig
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.model.structures import ModelMap
from gisp.run.folder import RunFolder
from gisp.run.metrics import PhaseClock, histogram_record, score_histogram
from gisp.run.record import library_versions
from gisp.run.setup import Setup, check_scores
from gisp.run.step import StepWriter, Transfer
from gisp.run.trajectory import StepRecord, Trajectory, move_to
from gisp.score.average import ScoreAverage
from gisp.score.objectives import SequenceLoss
from gisp.select.schedule import parameter_target, structure_ratio
from gisp.select.selector import Ranking, Selection

OnStep = Callable[[StepRecord, int], None]


class PruningLoop:
    """State of one run between steps.

    Args:
        spec: what the data are recorded as.
        base_path: where a later session finds the dense model, empty for a model in memory.
        loss: a user's own loss.
    """

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
        self.setup = Setup(config, model_map, data, (float(config.sparsity or 0),), loss)
        self.setup.allocate()
        self.selector, self.shrinkable = self.setup.selector, self.setup.shrinkable
        device = next(model_map.model.parameters()).device
        self.average = ScoreAverage(model_map.groups, self.setup.open, config.ema, device)
        self._device, self._transfer = device, Transfer(device)
        counts = {item.heads.name: model_map.num_heads for item in model_map.layers}
        counts |= {item.channels.name: model_map.intermediate_size for item in model_map.layers}
        self._removed_at = {name: np.zeros(count, dtype=np.int32) for name, count in counts.items()}
        self.trajectory = Trajectory(
            removed_at={name: torch.from_numpy(at) for name, at in self._removed_at.items()},
            base_model={"path": base_path, "fingerprint": self.shrinkable.fingerprint, **model_map.describe()},
            config=config.to_dict(),
            data=_describe(data, spec),
            versions=library_versions(),
            model=model_map.model,
        )

    def restore(self, done: Trajectory, folder: RunFolder) -> None:
        """Take up a run where it was cut.

        The weights are shrunk step by step as the run did it, so that every tensor is what it was, bit for bit.

        Args:
            folder: of the cut run, whose state is read.

        Raises:
            GispError: the run was made with other options, another model or other data.
        """
        self._check_same(done, folder.path)
        self.average.load(folder.load_state(len(done.steps), done.state_sha256))
        self.trajectory.steps = done.steps
        self.trajectory.complete, self.trajectory.state_sha256 = done.complete, done.state_sha256
        for name, at in done.removed_at.items():
            self._removed_at[name][:] = at.numpy()
        for step in range(1, len(done.steps) + 1):
            self.selector.apply(*self.selector.given(done.removal(step)))
        move_to(self.shrinkable, self.trajectory, len(done.steps))

    def _check_same(self, done: Trajectory, path: Path) -> None:
        """Refuse a run of another model, other data or other options."""
        now = self.trajectory
        for what, then, this in (
            ("model", done.base_model["fingerprint"], now.base_model["fingerprint"]),
            ("data", done.data.get("sha256"), now.data["sha256"]),
        ):
            if then != this:
                raise GispError(f"{path} was made with another {what}: give the same or another --out")
        for name, value in now.config.items():
            if name not in PLACE_OPTIONS and done.config.get(name) != value:
                raise GispError(
                    f"{path} was made with {name} {done.config.get(name)}, not {value}: "
                    "resume with the same options or give another --out"
                )
        then, this = ([task["objective"] for task in data.get("tasks", ())] for data in (done.data, now.data))
        if then != this:
            raise GispError(
                f"{path} was made with objectives {', '.join(then)} of its tasks, not {', '.join(this)}: "
                "resume with the same mixture or give another --out"
            )

    def run(self, folder: RunFolder | None, on_step: OnStep | None) -> Trajectory:
        """All steps that are left."""
        trajectory = self.trajectory
        steps = self.config.steps
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
        scored, scores = self.setup.score(step)
        clock.mark("forward_backward")
        averaged = self.average.update(scores, step)
        ranking, decides = self.selector.rank(averaged), self.selector.decides(averaged)
        target, selection = self._select(ranking, step, steps)
        histogram = score_histogram(ranking, self.selector.first_channel)
        clock.mark("select")
        writer.flush()
        results = (
            scored.loss,
            scored.finite,
            decides,
            selection.removed,
            selection.threshold,
            *histogram,
            self.average.average,
        )
        loss, finite, decided, removed, threshold, edges, counts, average = self._transfer.fetch(results)
        clock.settle()
        check_scores(step, float(loss), bool(finite), bool(decided))
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

    def _reached(self, record: StepRecord) -> bool:
        """Whether a ratio schedule has passed the sparsity it was to stop at."""
        goal = self.config.sparsity
        return self.config.schedule == "structures" and goal is not None and record.sparsity >= goal

    def _kv_bytes(self, removed_heads: np.ndarray) -> int:
        """Key and value bytes per token; a key/value head without any query head left is not counted."""
        heads = int((~removed_heads.reshape(len(self.map.layers) * self.map.num_kv_heads, -1)).any(1).sum())
        return 2 * heads * self.map.head_dim * next(self.map.model.parameters()).element_size()


def _describe(data: Sequences, spec: str) -> dict[str, Any]:
    """What a run records of its data."""
    described: dict[str, Any] = {"spec": spec, "sequences": len(data), "sha256": data.digest()}
    if data.tasks:
        described["tasks"] = [dataclasses.asdict(task) for task in data.tasks]
    return described
