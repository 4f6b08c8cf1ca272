"""What second-order scores are made of, from a model whose layers lie in several processes.

A step's batches pass from stage to stage by a schedule that all processes know. Every layer computes what it computes
in a model that is whole, and sums are added in the order in which one process adds them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gisp.errors import GispError
from gisp.score.context import Context
from gisp.score.fused.batch import MicroBatch, PassBatch, make_batch
from gisp.score.fused.block import Wanted
from gisp.score.fused.layers import Flow, Layers, embedded, lowest_scored
from gisp.score.fused.lm_head import LMHead
from gisp.score.fused.memory import what_layers_keep
from gisp.score.fused.products import Products
from gisp.score.fused.sums import parts_by_group, sample_sums
from gisp.score.fused.support import why_not
from gisp.score.staged.check import first_difference
from gisp.score.step_rows import StepRows
from gisp.stages.costs import layer_costs
from gisp.stages.group import Mail, Stages
from gisp.stages.placement import Placement, schedule_of
from gisp.stages.schedule import FORWARD, Action, Schedule
from gisp_kernels.groups import StructureGroup


@dataclass
class _Passing:
    """A batch between its first and its last action in this stage."""

    micro: MicroBatch
    batch: PassBatch
    gates: torch.Tensor
    wanted: dict[str, Wanted]
    # By chunk, from its forward to its backward.
    flows: dict[int, Flow]
    # The gradient that the end of the model leaves, until its backward begins.
    grad: torch.Tensor | None = None
    loss: torch.Tensor | None = None


class StagedPass:
    """Sums over the sequences of a step, the same bits in every process.

    Args:
        context: of a run with stages.
        products: of the layers.

    Attributes:
        schedule: of the last step.

    Raises:
        GispError: the model is none that the fused pass scores.
    """

    def __init__(self, context: Context, products: Products) -> None:
        assert context.stages is not None
        self._context, self._products = context, products
        self._stages: Stages = context.stages
        self._model = context.model
        self._head = LMHead(self._model, Products())
        self._placed: Placement | None = None
        self._chunks: dict[int, Layers] = {}
        self._checked = False
        self._schedules: dict[tuple[Placement, int, tuple[int, ...]], Schedule] = {}
        self.schedule: Schedule | None = None
        data = context.data
        if data.compared or any(task.objective == "choice" for task in data.tasks):
            raise GispError("objective choice passes answers through the whole model first: leave --stages out")
        reason = why_not(context.map, max(len(ids) for ids, _ in context.data.rows))
        if reason is not None:
            raise GispError(f"--stages needs a model that the fused pass scores: {reason}, leave it out")

    @torch.no_grad()
    def sums(self, groups: list[StructureGroup], parts: list[StepRows]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Of every group what :func:`gisp_kernels.gate_sums` gives, float64 [3, count], and the loss.

        Args:
            groups: those to score.
            parts: the slices of the step.
        """
        self._take_placement()
        if not self._checked:
            self._check(parts)
        bounds = [replica * len(parts) // self._stages.replicas for replica in range(self._stages.replicas + 1)]
        numbers = range(bounds[self._stages.replica], bounds[self._stages.replica + 1])
        micros = [(number, micro) for number in numbers for micro in parts[number].micro_batches()]
        scored = [(group.name, group.count) for group in groups]
        passed = self._pass([micro for _, micro in micros], scored)
        own = {*self._own(groups)}
        slices: dict[int, dict[str, torch.Tensor]] = {}
        losses = torch.zeros(len(parts), dtype=torch.float64, device=self._context.device)
        for (number, micro), done in zip(micros, passed, strict=True):
            sums = parts_by_group(scored, sample_sums(done.gates, done.batch, micro))
            found = {name: values for name, values in sums.items() if name in own}
            total = slices.get(number)
            slices[number] = {name: total[name] + values for name, values in found.items()} if total else found
            if done.loss is not None:
                losses[number] += done.loss
        return self._together(groups, numbers, bounds, slices, losses)

    def _take_placement(self) -> None:
        """Follow the layers where they were moved."""
        placement = self._stages.placement
        assert placement is not None
        if placement == self._placed:
            return
        self._placed = placement
        layers = self._context.map.layers
        self._chunks = {
            chunk: Layers([layers[i] for i in held], self._products)
            for chunk, held in enumerate(placement.chunks)
            if placement.stage_of(chunk) == self._stages.stage
        }

    def _check(self, parts: list[StepRows]) -> None:
        """Compare the pass with the model, once, on the first sequence.

        Raises:
            GispError: they differ.
        """
        assert self._placed is not None
        first = next(part.numbers[0] for part in parts if part.numbers)
        ids = self._context.data.batch([first])[0]
        chunks = {chunk: Layers(layers.items, Products()) for chunk, layers in self._chunks.items()}
        reason = first_difference(self._stages, self._placed, chunks, self._model, self._context.weight, ids)
        if reason is not None:
            raise GispError(f"--stages needs a model that the fused pass scores: {reason}, leave it out")
        self._checked = True

    def _pass(self, micros: list[MicroBatch], scored: Sequence[tuple[str, int]]) -> list[_Passing]:
        """Pass batches through the layers of this stage, in turn with the other stages."""
        weight = self._context.weight
        passing = []
        for micro in micros:
            batch = make_batch(self._model.model, micro)
            size = batch.rows, sum(count for _, count in scored)
            gates = torch.zeros(size, dtype=torch.float32, device=weight.device)
            wanted = {name: Wanted(gates=part) for name, part in parts_by_group(scored, gates).items()}
            passing.append(_Passing(micro, batch, gates, wanted, {}))
        tokens = tuple(item.batch.rows * item.batch.length for item in passing)
        lowest = lowest_scored(self._context.map.layers, {name for name, _ in scored})
        schedule = self.schedule = self._schedule(lowest, tokens)
        if not tokens:
            return passing
        assert self._placed is not None
        _StageRun(self, passing, lowest, schedule, self._placed).all_actions()
        return passing

    def _schedule(self, lowest: int, tokens: tuple[int, ...]) -> Schedule:
        assert self._placed is not None
        key = self._placed, lowest, tokens
        if key not in self._schedules:
            # Of another placement or other batches none comes again soon.
            self._schedules = dict([*self._schedules.items()][-15:])
            self._schedules[key] = schedule_of(layer_costs(self._context.map, lowest), self._placed, tokens)
        return self._schedules[key]

    def _own(self, groups: list[StructureGroup], stage: int | None = None) -> list[str]:
        """Names of groups in a stage, this one by default, in their order."""
        assert self._placed is not None
        held = {*self._placed.held(self._stages.stage if stage is None else stage)}
        layers = (item for item in self._context.map.layers if item.index in held)
        names = {name for item in layers for name in (item.heads.name, item.channels.name)}
        return [group.name for group in groups if group.name in names]

    def _together(
        self,
        groups: list[StructureGroup],
        numbers: range,
        bounds: list[int],
        slices: dict[int, dict[str, torch.Tensor]],
        losses: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """One collective that brings the sums of all stages and slices to every process, added in slice order."""
        stages, device = self._stages, self._context.device
        counts = {group.name: group.count for group in groups}
        names = [self._own(groups, stage) for stage in range(stages.count)]
        widths = [3 * sum(counts[name] for name in own) + 1 for own in names]
        own, width = names[stages.stage], widths[stages.stage]
        rows = torch.zeros(len(numbers), max(widths), dtype=torch.float64, device=device)
        for row, number in zip(rows, numbers, strict=True):
            if number in slices:
                row[:width] = torch.cat([*(slices[number][name].flatten() for name in own), losses[number, None]])
        each = [stop - start for start, stop in itertools.pairwise(bounds)]
        if stages.replicas == 1:
            # All slices are here, and are added here in their order.
            rows, each = _added(rows)[None], [1]
        gathered = stages.processes.gather(rows, max(each))
        found: dict[str, torch.Tensor] = {}
        loss = losses[0]
        for stage, (held, wide) in enumerate(zip(names, widths, strict=True)):
            ranks = (replica * stages.count + stage for replica in range(stages.replicas))
            total = _added(torch.cat([gathered[rank, :count] for rank, count in zip(ranks, each, strict=True)]))
            *flat, last = total[:wide].split([*(3 * counts[name] for name in held), 1])
            found |= {name: values.view(3, counts[name]) for name, values in zip(held, flat, strict=True)}
            if self._ends(stage):
                loss = last[0]
        return {group.name: found[group.name] for group in groups}, loss

    def _ends(self, stage: int) -> bool:
        """Whether a stage holds the end of the model."""
        assert self._placed is not None
        return self._placed.stage_of(len(self._placed.chunks) - 1) == stage


class _StageRun:
    """One step of one stage."""

    def __init__(
        self,
        owner: StagedPass,
        passing: list[_Passing],
        lowest: int,
        schedule: Schedule,
        placement: Placement,
    ) -> None:
        self._passing, self._scored_from, self._schedule = passing, lowest, schedule
        self._placement, self._chunks = placement, owner._chunks
        self._model, self._head, self._stages = owner._model, owner._head, owner._stages
        self._last = len(placement.chunks) - 1
        # By chunk its first layer that keeps anything.
        self._lowest = {c: min(max(0, lowest - placement.bounds[c]), len(held)) for c, held in self._chunks.items()}
        weight, hidden = owner._context.weight, owner._context.map.hidden_size

        def empty(action: Action) -> torch.Tensor:
            batch = passing[action.batch].batch
            return torch.empty(batch.rows * batch.length, hidden, dtype=weight.dtype, device=weight.device)

        self._mail = Mail(self._stages, schedule.arrivals(self._stages.stage), empty)
        most = max(item.batch.rows * item.batch.length for item in passing)
        held = schedule.most_held(self._stages.stage)
        kept = [(held.get(c, 0), layers.items[self._lowest[c] :]) for c, layers in self._chunks.items()]
        self._kept = what_layers_keep(kept, most, weight.device)

    def all_actions(self) -> None:
        """Do what the schedule has for this stage."""
        for action in self._schedule.actions[self._stages.stage]:
            if action.kind == FORWARD:
                self._forward(action)
            else:
                self._backward(action)
        self._mail.finish()

    def _forward(self, action: Action) -> None:
        chunk, item = action.chunk, self._passing[action.batch]
        layers, lowest = self._chunks[chunk], self._lowest[chunk]
        flow = Flow(item.batch, self._mail.take(action)) if chunk else embedded(self._model, item.batch)
        layers.forward([flow], lowest, self._kept)
        if flow.kept:
            item.flows[chunk] = flow
        if chunk == self._last:
            item.loss, item.grad = self._head.loss_and_grad(*flow.leave(), item.batch)
            return
        x, delta = flow.leave()
        out = x if delta is None else delta.add_(x)
        self._mail.send(out, self._placement.stage_of(chunk + 1))

    def _backward(self, action: Action) -> None:
        chunk, item = action.chunk, self._passing[action.batch]
        if chunk == self._last:
            grad, item.grad = item.grad, None
        else:
            grad = self._mail.take(action)
        assert grad is not None
        through = self._placement.bounds[chunk] > self._scored_from
        flow, lowest = item.flows.pop(chunk), self._lowest[chunk]
        self._chunks[chunk].backward([flow], [grad], [item.wanted], lowest, through)
        if through:
            self._mail.send(grad, self._placement.stage_of(chunk - 1))


def _added(rows: torch.Tensor) -> torch.Tensor:
    """Rows [R, n] added one after the other."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total
