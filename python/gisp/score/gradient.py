"""Criteria made of gradients of the loss, by the fused pass or by autograd over the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from gisp.config.criteria import CRITERIA
from gisp.data.sequences import IGNORED
from gisp.errors import GispError
from gisp.model.modes import deterministic, evaluation_mode, frozen
from gisp.offload.passes import LayerwisePasses
from gisp.offload.stream import LayerStream
from gisp.progress import note
from gisp.score.base import StepScores
from gisp.score.context import Context
from gisp.score.first_order import averaged_batches, first_order_weights
from gisp.score.fused import Float8Products, Followers, ImportancePass, MicroBatch, differs, why_not
from gisp.score.fused.products import Products
from gisp.score.fused.sums import parts_by_group
from gisp.score.objectives import answer_nll, objective_name, own_losses, sequence_curvature, sequence_nll
from gisp.score.staged import StagedPass
from gisp.score.step_rows import StepRows
from gisp_kernels import loss_change, record_importance
from gisp_kernels.groups import StructureGroup
from gisp_kernels.ops import float8
from gisp_kernels.record.gates import gate_columns
from gisp_kernels.record.recorder import ImportanceRecorder
from gisp_kernels.record.targets import Mode

# By group what scores are made of, and the loss.
Sums = tuple[dict[str, torch.Tensor], torch.Tensor]


class GradientScorer:
    """Scores the structures of a model by gradients of the loss on calibration sequences.

    What is summed is the criterion's ``gradient``. ``absolute``: ``sum |W * G|`` over a structure. ``signed``:
    ``|sum W * G|``. ``second-order``: the change of the loss predicted when the structure goes. With engine ``stream``
    a step sees one fresh batch, and |W * G| is reduced as G is formed; with ``exact``, or where a batch takes several
    backward passes, G is summed in fp32 over all of them before the absolute value (paper Eq. 8). The other two kinds
    add up over backward passes and need no gradient buffer.

    The fused pass of :mod:`gisp.score.fused` takes one backward pass of absolute scores and all second-order ones
    where it knows the model's layout, autograd with recorded Linear layers everything else.

    Attributes:
        refused: why the fused pass does not score this model, ``None`` as long as nothing speaks against it.

    Raises:
        GispError: ``fp8`` where there are no 8-bit products.
    """

    def __init__(self, context: Context) -> None:
        config, weight = context.config, context.weight
        reason = float8.why_not(weight.device, weight.dtype) if config.fp8 else None
        if reason is not None:
            raise GispError(f"--fp8 cannot run here: {reason}, leave it out")
        self._context = context
        self._config = config
        self._kind = CRITERIA[str(config.criterion)].gradient
        self._model, self._device = context.model, context.device
        self._stream = LayerStream.of(context.model)
        self._fused: ImportancePass | None = None
        self._staged: StagedPass | None = None
        if context.stages is not None:
            self._staged = StagedPass(context, Float8Products() if config.fp8 else Products())
        self.refused = f"{objective_name(context.loss)} is a loss of its own" if context.loss else None

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step."""
        rows, parts = self._rows(step)
        with deterministic(self._device):
            scores, loss = self._sums(groups, rows, parts, {})
            if self._kind == "second-order":
                scores = self._loss_changes(scores, rows, step)
        return StepScores.of(scores, loss, sum(part.tokens for part in parts))

    def gate_sums(
        self, step: int, groups: list[StructureGroup], closed: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, int, int]:
        """What second-order scores of a step are made of, with some structures' gates at 0.

        Args:
            closed: group name -> bool [count], gates at 0.

        Returns:
            Group name -> float64 [3, count] as of :func:`gisp_kernels.gate_sums`, the loss, tokens passed, and how many
            independent sequences they are sums of.
        """
        rows, parts = self._rows(step)
        with deterministic(self._device):
            sums, loss = self._sums(groups, rows, parts, closed)
        return sums, loss, sum(part.tokens for part in parts), rows.samples

    def _rows(self, step: int) -> tuple[StepRows, list[StepRows]]:
        """The rows of a step, and the parts of them that are summed by themselves."""
        steps, slices = self._context.steps, self._config.slices
        rows = StepRows.of(steps, step)
        if slices is None:
            return rows, [rows]
        return rows, [rows.part(steps, start, stop) for start, stop in steps.slices(step, slices)]

    def _sums(
        self,
        groups: list[StructureGroup],
        rows: StepRows,
        parts: list[StepRows],
        closed: Mapping[str, torch.Tensor],
    ) -> Sums:
        """What scores are made of, from all parts of a step, in whatever process they are passed."""
        # Once for all parts: to find a width in a model takes as long as a launch.
        counts = [group.count for group in groups]
        if self._config.slices is None:
            return self._of_part(groups, counts, rows, closed)
        if self._staged is not None:
            return self._staged.sums(groups, parts)
        # Whether the fused pass is taken is found once, by the same sequence in every process.
        self._fused_pass(rows)
        sizes = [3 * count for count in counts]

        def packed(number: int) -> torch.Tensor:
            if not parts[number].numbers:
                return torch.zeros(sum(sizes) + 1, dtype=torch.float64, device=self._device)
            sums, loss = self._of_part(groups, counts, parts[number], closed)
            return torch.cat([*(sums[group.name].flatten() for group in groups), loss[None]])

        *flat, loss = self._context.replicas.total(len(parts), packed).split([*sizes, 1])
        return {g.name: part.view(3, n) for g, n, part in zip(groups, counts, flat, strict=True)}, loss[0]

    def _of_part(
        self, groups: list[StructureGroup], counts: list[int], rows: StepRows, closed: Mapping[str, torch.Tensor]
    ) -> Sums:
        """The same from rows that pass one after the other in this process."""
        # One backward pass needs no gradient buffer; several must be summed before the absolute value.
        one_pass = self._context.steps.fresh and len(rows.batches) == 1
        if rows.questions.places:
            rows = self._compared(rows)
        able = one_pass if self._kind == "absolute" else self._kind == "second-order"
        fused = self._fused_pass(rows) if able else None
        if fused is not None:
            sums, loss = self._by_fused_pass(fused, groups, counts, rows, closed)
        else:
            if self._config.fp8:
                reason = self.refused or f"--batch-size {self._config.batch_size} makes several batches of a step"
                of_one = " over one batch" if self._kind == "absolute" else ""
                raise GispError(f"--fp8 needs the fused pass{of_one}: {reason}, leave it out")
            mode: Mode = "stream" if one_pass else "exact"
            if self._kind in ("signed", "second-order"):
                mode = self._kind
            sums, loss = self._by_autograd(groups, rows, mode, closed)
        return sums, loss + rows.correction

    def _fused_pass(self, rows: StepRows) -> ImportancePass | None:
        """The fused pass, if it computes what the model computes; compared once, on the first sequence."""
        if self._fused is None and self.refused is None:
            model_map, data = self._context.map, self._context.data
            self.refused = why_not(model_map, max(len(ids) for ids, _ in data.rows))
            if self.refused is None:
                candidate = ImportancePass(model_map)
                ids = data.batch(rows.numbers[:1])[0]
                candidate.compile_ahead(ids)
                with evaluation_mode(self._model):
                    self.refused = differs(self._model, candidate.streams(ids), ids)
                if self.refused is None:
                    self._fused = ImportancePass(model_map, Float8Products()) if self._config.fp8 else candidate
            if self.refused is not None:
                note(f"gradients come from autograd, which takes more time and memory: {self.refused}")
        return self._fused

    def _compared(self, rows: StepRows) -> StepRows:
        """The rows with the weights that the answers' likelihoods give those of questions, by a forward pass."""
        fused, data = self._fused_pass(rows), rows.data
        parts = [[i for i in rows.leading(*batch) if i in rows.questions.owners] for batch in rows.batches]
        if fused is None:
            parts = list(self._context.steps.small(rows.numbers, [i for part in parts for i in part]))
        found, owners = [], []
        with torch.no_grad(), evaluation_mode(self._model):
            micros = [rows.micro_batch(part) for part in parts if part]
            # Layers that are fetched are visited by all of them.
            together = fused.token_nll(micros) if fused and self._stream else None
            for number, micro in enumerate(micros):
                if together is not None:
                    found.append(together[number])
                else:
                    found.append(fused.token_nll([micro])[0] if fused else torch.cat(self._answer_nll(micro)))
                counts = [data.scored[rows.numbers[i]] for i in micro.positions]
                owners.append(torch.tensor(micro.positions).repeat_interleave(torch.tensor(counts)))
        nll = torch.zeros(len(rows.numbers), dtype=torch.float64)
        nll.index_add_(0, torch.cat(owners), torch.cat(found).double().cpu())
        tokens, signs = ([of[i] for i in rows.numbers] for of in (data.scored, data.signs))
        weights, correction = rows.questions.compare(nll, tokens, signs, rows.weights)
        return replace(rows, weights=weights, correction=correction)

    def _loss_changes(self, sums: dict[str, torch.Tensor], rows: StepRows, step: int) -> dict[str, torch.Tensor]:
        """Predicted changes of the loss from sums over all sequences of a step."""
        # One sample tells nothing of its noise, and of sequences of both signs only differences should count.
        if not sums:
            return {}
        # All groups in one go: of a small model's many groups each would cost the host a launch or four.
        scored = [(name, values.shape[1]) for name, values in sums.items()]
        together = torch.cat([*sums.values()], dim=1)
        if self._config.first_order != "shrunk" or rows.samples < 2 or rows.opposed:
            return parts_by_group(scored, loss_change(together))
        batches = averaged_batches(float(self._config.ema or 0), step) if self._context.steps.fresh else 1.0
        # Data seen again brings no new noise to average.
        batches = min(batches, max(1.0, len(rows.data.rows) / len(rows.numbers)))
        kinds = {group.name: group.kind for group in self._context.map.groups}
        trust = first_order_weights(sums, kinds, rows.samples, batches)
        by_structure = torch.cat([trust[name].expand(count) for name, count in scored])
        return parts_by_group(scored, loss_change(together, by_structure))

    def _by_fused_pass(
        self,
        fused: ImportancePass,
        groups: list[StructureGroup],
        counts: list[int],
        rows: StepRows,
        closed: Mapping[str, torch.Tensor],
    ) -> Sums:
        gates = {g.name: gate_columns(g, closed[g.name], self._context.weight.dtype) for g in groups} if closed else {}
        run = partial(fused.gate_sums, gates_at=gates) if self._kind == "second-order" else fused.score
        scored = [(group.name, count) for group, count in zip(groups, counts, strict=True)]
        total: dict[str, torch.Tensor] = {}
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        micros = list(rows.micro_batches())
        # Layers that are fetched are visited by all of them; else one goes after the other, which keeps less.
        for together in [micros] if self._stream else [[micro] for micro in micros]:
            for found, part in run(together, scored):
                total = {name: total[name] + values for name, values in found.items()} if total else found
                loss += part
        return total, loss

    def _by_autograd(
        self,
        groups: list[StructureGroup],
        rows: StepRows,
        mode: Mode,
        closed: Mapping[str, torch.Tensor],
    ) -> Sums:
        if self._stream is not None:
            return self._by_layers(self._stream, groups, rows, mode, closed)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        recorded = record_importance(groups, mode=mode, closed=closed or None)
        with frozen(self._model), torch.enable_grad(), recorded as recorder:
            for micro in rows.micro_batches():
                self._set_samples(recorder, micro)
                loss = self._loss(micro)
                # A block of a layer without any live structure passes no gradient on.
                if loss.requires_grad:
                    loss.backward()
                elif self._context.loss is not None and groups:
                    raise GispError(
                        "the loss of your own has no gradient: compute it with gradients enabled and without detach()"
                    )
                total += loss.detach()
            return _recorded(recorder), total

    def _by_layers(
        self,
        stream: LayerStream,
        groups: list[StructureGroup],
        rows: StepRows,
        mode: Mode,
        closed: Mapping[str, torch.Tensor],
    ) -> Sums:
        """The same where layers come one after the other: each is recorded for the time of its backward."""
        micros = list(rows.micro_batches())
        layer_of = {g.name: item.index for item in self._context.map.layers for g in (item.heads, item.channels)}
        lowest = min((layer_of[group.name] for group in groups), default=len(self._context.map.layers))
        found: dict[str, torch.Tensor] = {}

        @contextmanager
        def recorded(layer: int) -> Iterator[Callable[[int], None]]:
            own = [group for group in groups if layer_of[group.name] == layer]
            gates = {group.name: closed[group.name] for group in own if group.name in closed}
            with record_importance(own, mode=mode, closed=gates or None) as recorder:
                yield lambda number: self._set_samples(recorder, micros[number])
                # The scores of summed gradients are made with the weights, which are gone afterwards.
                found.update(_recorded(recorder))

        ids = [micro.ids.to(self._device) for micro in micros]
        with frozen(self._model):
            run = LayerwisePasses(self._model, stream).run
            losses = run(ids, lambda number: self._loss(micros[number]), lowest, recorded)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for loss in losses:
            total += loss
        return {group.name: found[group.name] for group in groups}, total

    def _set_samples(self, recorder: ImportanceRecorder, micro: MicroBatch) -> None:
        """Tell a recorder what the sequences of the coming backward pass weigh."""
        if micro.samples is None:
            weights = torch.tensor(micro.weights, device=self._device)
            recorder.curvature = sequence_curvature(micro.labels.to(self._device), weights)
        else:
            recorder.curvature = micro.samples.curvature.to(self._device)
            recorder.samples = micro.samples.index.to(self._device)

    def _loss(self, micro: MicroBatch) -> torch.Tensor:
        """The weighted loss of a micro-batch, 0-dim with its graph."""
        ids, labels = micro.ids.to(self._device), micro.labels.to(self._device)
        weights = torch.tensor(micro.weights, device=self._device)
        if self._context.loss is not None:
            return (own_losses(self._context.loss, self._model, ids, labels) * weights).sum()
        if micro.followers is None:
            return (sequence_nll(self._model, ids, labels) * weights).sum()
        own, others = self._answer_nll(micro)
        tokens = (labels[:, 1:] != IGNORED).sum(1)
        shares = torch.tensor(micro.followers.weights, device=self._device)
        return (own * (weights / tokens).repeat_interleave(tokens)).sum() + (others * shares).sum()

    def _answer_nll(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """NLL of the scored tokens of a micro-batch, and of its followers."""
        followers = micro.followers or Followers([], [], [])
        rows, tokens = torch.tensor([followers.rows, followers.tokens], dtype=torch.int64, device=self._device)
        return answer_nll(self._model, micro.ids.to(self._device), micro.labels.to(self._device), rows, tokens)


def _recorded(recorder: ImportanceRecorder) -> dict[str, torch.Tensor]:
    return recorder.gate_sums() if recorder.mode == "second-order" else recorder.scores()
