"""The pruning loop: score, smooth, select, shrink, record; paper Algorithm 1 with physical removal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gisp.config.options import IN_MEMORY, OFFICIAL_RATIO, OPTIONS, PLACE_OPTIONS, PruneConfig
from gisp.data import Sequences
from gisp.data.held_out import held_out_of_run, remember_run_text
from gisp.errors import GispError
from gisp.model.structures import ModelMap
from gisp.offload.stream import LayerStream
from gisp.progress import task
from gisp.replicas.group import Replicas
from gisp.run.folder import RunFolder
from gisp.run.metrics.measure import PhaseClock, histogram_record, score_histogram, step_details
from gisp.run.record import library_versions
from gisp.run.regrow import Regrowth
from gisp.run.resources.estimate import announce
from gisp.run.setup import Setup, check_scores
from gisp.run.step import StepWriter, Transfer
from gisp.run.trajectory import StepRecord, Trajectory, move_to
from gisp.score.average import ScoreAverage
from gisp.score.objectives import SequenceLoss
from gisp.select.schedule import parameter_target, structure_ratio
from gisp.select.selector import Ranking, Selection
from gisp.stages.group import Stages
from gisp.stages.moves import EVERY, rebalance

# Unused part of the structures' memory above which kept weights move up: it would cross to the device in vain.
_SLACK = 0.1
OnStep = Callable[[StepRecord, int], None]


class PruningLoop:
    """State of one run between steps.

    Args:
        spec: what the data are recorded as.
        base_path: where a later session finds the dense model, empty for a model in memory.
        loss: a user's own loss.
        replicas, stages: as of :class:`gisp.run.setup.Setup`.

    Attributes:
        spare: sequences that ``samples`` leaves out, where there are any.
    """

    spare: Sequences | None = None

    def __init__(
        self,
        model_map: ModelMap,
        data: Sequences,
        config: PruneConfig,
        spec: str,
        base_path: str,
        loss: SequenceLoss | None = None,
        replicas: Replicas | None = None,
        stages: Stages | None = None,
    ) -> None:
        self.map = model_map
        self.config = config
        self.setup = Setup(config, model_map, data, (float(config.sparsity or 0),), loss, replicas, stages)
        self.setup.allocate()
        self.selector, self.shrinkable = self.setup.selector, self.setup.shrinkable
        device = model_map.weight.device
        self.average = ScoreAverage(model_map.groups, self.setup.open, config.ema, device)
        self._device, self._transfer = device, Transfer(device)
        stream = LayerStream.of(model_map.model)
        self._streams = stream is not None
        # Of layers on the device the strides stay: by them products are chosen.
        away = [item for item in model_map.layers if stream and stream.holds(item.attention.o_proj.weight)]
        self._away = [group.name for item in away for group in (item.heads, item.channels)]
        counts = {item.heads.name: model_map.num_heads for item in model_map.layers}
        counts |= {item.channels.name: model_map.intermediate_size for item in model_map.layers}
        self._removed_at = {name: np.zeros(count, dtype=np.int32) for name, count in counts.items()}
        self.trajectory = Trajectory(
            removed_at={name: torch.from_numpy(at) for name, at in self._removed_at.items()},
            base_model={
                "path": base_path,
                "fingerprint": self.shrinkable.fingerprint,
                **model_map.describe(),
                "biases": sorted(model_map.biased),
            },
            config=config.to_dict(),
            data=_describe(data, spec),
            versions=library_versions(),
            model=model_map.model,
            held_out=held_out_of_run(data),
        )
        remember_run_text(model_map.model, self.trajectory.held_out)
        self.regrowth = Regrowth(self.setup, model_map, config, self.trajectory)

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
        self._keep_places(done)
        self.trajectory.steps = done.steps
        self.trajectory.complete, self.trajectory.state_sha256 = done.complete, done.state_sha256
        for name, at in done.removed_at.items():
            self._removed_at[name][:] = at.numpy()
        for step in range(1, len(done.steps) + 1):
            self.selector.apply(*self.selector.given(done.removal(step)))
        move_to(self.shrinkable, self.trajectory, len(done.steps))
        if "biases" not in done.base_model:
            # Versions that did not record biases did not count them.
            self._correct_sizes()

    def _keep_places(self, done: Trajectory) -> None:
        """Leave it said where model and data lie to a run that goes on with those of this process's memory."""
        now = self.trajectory
        now.base_model["path"] = now.base_model["path"] or done.base_model["path"]
        if now.data["spec"] == IN_MEMORY:
            now.data["spec"] = done.data["spec"]

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
            # A run of an earlier version did what the default of an option it had not does.
            made_with = done.config.get(name, OPTIONS[name].default)
            if name not in PLACE_OPTIONS and made_with != value:
                raise GispError(
                    f"{path} was made with {name} {made_with}, not {value}: "
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
        steps = self.config.steps + self.config.regrow
        writer = StepWriter(overlap=self._device.type == "cuda")
        if not trajectory.complete and not self._streams:
            announce(self.map, self.setup.context, steps - len(trajectory.steps))
        with task("pruning", steps, begun=len(trajectory.steps)) as progress:
            try:
                while not trajectory.complete:
                    clock = PhaseClock(self._device)
                    step = len(trajectory.steps) + 1
                    earlier = None
                    if step > self.config.steps:
                        earlier = trajectory.tensors()
                        record, metrics, state = self._regrow(step, clock, writer)
                    else:
                        record, metrics, state = self._step(step, self.config.steps, clock)
                    trajectory.steps.append(record)
                    trajectory.complete = step == steps or self._reached(record)
                    if folder:
                        # How long its own writing held it up a step cannot write down; it carries the previous step's.
                        clock.seconds["write"] = writer.held_up
                        metrics["seconds"] = clock.seconds
                        writer.take(folder.commit(trajectory, metrics, state, earlier))
                    progress.advance(details=step_details(record, self.config.objective))
                    if on_step:
                        with self.setup.context.replicas.elsewhere():
                            on_step(record, steps)
            finally:
                writer.close()
        trajectory.unseen = self._unseen()
        return trajectory

    def _unseen(self) -> Sequences | None:
        """Sequences the run has not seen: left out of its samples, or never drawn; ``None`` of a mixture."""
        context = self.setup.context
        if context.data.tasks or self.spare is not None:
            return self.spare
        # A step that trains gates draws a batch for each of its training steps.
        batches = len(self.trajectory.steps) * (self.config.gate_steps or 1)
        left = context.steps.unseen(self.regrowth.last_batch or batches)
        return context.data.chosen(left) if left else None

    def _step(
        self, step: int, steps: int, clock: PhaseClock
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
        if self._streams and self.shrinkable.slack > _SLACK:
            self.shrinkable.pack(in_place=True, groups=self._away)
        self._rebalance(step)
        clock.mark("compact")
        sizes = self._sizes(self.selector.removed)
        record = StepRecord(
            step=step, target=target, loss=float(loss), tokens=scored.tokens, seconds=clock.total(), **sizes
        )
        metrics = self._metrics(record, removal.threshold, histogram_record(edges, counts), clock)
        return record, metrics, self.average.state(average)

    def _rebalance(self, step: int) -> None:
        """Let layers of a split model move once in a while."""
        stages = self.setup.context.stages
        if stages is not None and step % EVERY == 0:
            live = (
                item.index
                for item in self.map.layers
                for group in (item.heads, item.channels)
                if group.name in self.setup.open and self.shrinkable.kept(group.name)
            )
            passes = -(-int(self.config.slices or 1) // stages.replicas)
            rebalance(stages, self.shrinkable, min(live, default=len(self.map.layers)), passes)

    def _regrow(
        self, step: int, clock: PhaseClock, writer: StepWriter
    ) -> tuple[StepRecord, dict[str, Any], dict[str, torch.Tensor]]:
        """One round after the schedule, as :meth:`_step`; it corrects the sizes of the steps before."""
        writer.flush()
        clock.settle()
        found = self.regrowth.round(step - self.config.steps)
        clock.mark("forward_backward")
        if found.returned:
            self._correct_sizes()
        record = StepRecord(
            step=step,
            target=float(self.config.sparsity or 0),
            loss=found.loss,
            tokens=found.tokens,
            seconds=clock.total(),
            **self._sizes(self.selector.removed),
        )
        histogram = histogram_record(
            *(part.cpu() for part in score_histogram(found.ranking, self.selector.first_channel))
        )
        metrics = self._metrics(record, found.threshold, histogram, clock)
        metrics |= {"returned": found.returned, "judged": found.judged}
        return record, metrics, self.average.state(self.average.average.cpu())

    def _correct_sizes(self) -> None:
        """Let the records of all steps say what is removed at them."""
        starts = self.selector.structures_at(self.trajectory.removed_at)
        for number, record in enumerate(self.trajectory.steps, start=1):
            sizes = self._sizes((starts > 0) & (starts <= number))
            self.trajectory.steps[number - 1] = dataclasses.replace(record, **sizes)

    def _metrics(
        self, record: StepRecord, threshold: float | None, histogram: dict[str, Any], clock: PhaseClock
    ) -> dict[str, Any]:
        return {
            "step": record.step,
            "loss": record.loss,
            "sparsity": record.sparsity,
            "threshold": threshold,
            "tokens_per_second": record.tokens / max(clock.seconds["forward_backward"], 1e-9),
            "score_histogram": histogram,
            "peak_bytes": clock.peak_bytes(),
        }

    def _sizes(self, removed: np.ndarray[Any, Any]) -> dict[str, Any]:
        """What a record says of the size without the structures of a mask, bool [structures]."""
        parameters = self.selector.parameters_of(removed)
        heads, channels = np.split(removed, [self.selector.head_structures])
        return {
            "sparsity": parameters / self.map.decoder_parameters,
            "model_sparsity": parameters / self.map.parameters,
            "removed_parameters": parameters,
            "heads_removed": int(np.count_nonzero(heads)) * self.map.heads_per_structure,
            "channels_removed": int(np.count_nonzero(channels)),
            "kv_bytes_per_token": self._kv_bytes(heads),
        }

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
        return 2 * heads * self.map.head_dim * self.map.weight.element_size()


def _describe(data: Sequences, spec: str) -> dict[str, Any]:
    """What a run records of its data."""
    described: dict[str, Any] = {"spec": spec, "sequences": len(data), "sha256": data.digest()}
    if data.tasks:
        described["tasks"] = [dataclasses.asdict(task) for task in data.tasks]
    return described
