"""The two ways to score a step: ``stream`` (one fresh batch, no gradient buffer) and ``exact`` (the whole set)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gisp.config.criteria import ScoreKind
from gisp.data import Sequences
from gisp.data.batches import StepBatches
from gisp.data.sequences import IGNORED
from gisp.errors import GispError
from gisp.model.modes import deterministic, evaluation_mode, frozen
from gisp.model.structures import ModelMap
from gisp.score.first_order import averaged_batches, first_order_weights
from gisp.score.fused import Float8Products, FurtherAnswers, ImportancePass, differs, why_not
from gisp.score.objectives import SequenceLoss, answer_nll, objective_name, own_losses, sequence_curvature, sequence_nll
from gisp.score.step_rows import Portion, StepRows
from gisp_kernels import loss_change, record_importance
from gisp_kernels.groups import StructureGroup
from gisp_kernels.ops import float8
from gisp_kernels.record.recorder import Mode


@dataclass(frozen=True)
class StepScores:
    """Scores of one step. Nothing here has waited for the GPU, but for what objective ``choice`` weighs answers by.

    Attributes:
        scores: group name -> fp32 [current count], on the model's device, by current position.
        loss: loss of the scored sequences before anything of this step is removed, 0-dim fp64 on the device.
        finite: whether all scores are finite, 0-dim bool on the device.
        tokens: tokens passed through the model.
    """

    scores: dict[str, torch.Tensor]
    loss: torch.Tensor
    finite: torch.Tensor
    tokens: int

    @classmethod
    def of(cls, scores: dict[str, torch.Tensor], loss: torch.Tensor, tokens: int) -> StepScores:
        """Scores of a step, with whether all of them are finite."""
        return cls(
            scores,
            loss,
            torch.isfinite(torch.cat([*scores.values()])).all() if scores else torch.isfinite(loss),
            tokens,
        )


class Engine:
    """Scores the structures of a model on calibration sequences.

    A step of ``stream``, and any step of second-order scores, runs the written-out pass of :mod:`gisp.score.fused`
    where the model's layout allows it, any other step autograd over the model with recorded Linear layers.

    Args:
        model_map: map of the dense model; its own ``requires_grad`` flags are respected again after each call.
        data: calibration sequences.
        kind: ``stream``: each step one batch of about ``batch_tokens`` tokens (of absolute scores |W * G| is reduced as
            G is formed); ``exact``: every step the whole set, G summed in fp32 before the absolute value (paper Eq. 8).
        batch_size: sequences per backward pass; ``None``: the whole step for ``stream``, for ``exact`` what keeps the
            logits small. It never changes a score beyond rounding: a ``stream`` step of several backward passes
            needs the gradient buffers of ``exact``.
        fp8: 8-bit products of the decoder layers, by the written-out pass alone.
        loss: a user's own loss per sequence instead of the mean NLL, by autograd (see ``objectives.SequenceLoss``).
        score: ``absolute``: ``sum |W * G|`` over a structure; ``signed``: ``|sum W * G|``, by recorded Linear layers
            always; ``second-order``: the change of the loss predicted when the structure goes. The last two add up over
            backward passes, so that neither kind needs a gradient buffer.
        shrunk: ``second-order`` alone: the first-order term shrunk by its noise (:mod:`gisp.score.first_order`).
        ema: weight of the past in the average that the scores go into, for ``shrunk``.

    Raises:
        GispError: ``fp8`` where there are no 8-bit products.
    """

    def __init__(
        self,
        model_map: ModelMap,
        data: Sequences,
        *,
        kind: str,
        batch_size: int | None,
        batch_tokens: int,
        seed: int,
        fp8: bool = False,
        loss: SequenceLoss | None = None,
        score: ScoreKind = "absolute",
        shrunk: bool = False,
        ema: float = 0.0,
    ) -> None:
        self._fp8 = fp8
        self._shrunk, self._ema = shrunk, ema
        self._score = score
        self._map = model_map
        self._model = model_map.model
        self._data = data
        self._batch_size = batch_size
        weight = next(self._model.parameters())
        self._device = weight.device
        reason = float8.why_not(weight.device, weight.dtype) if fp8 else None
        if reason is not None:
            raise GispError(f"--fp8 cannot run here: {reason}, leave it out")
        self._pass: ImportancePass | None = None
        self._loss = loss
        self._pass_refused: str | None = f"{objective_name(loss)} is a loss of its own" if loss else None
        self._steps = StepBatches(model_map, data, kind=kind, batch_size=batch_size, tokens=batch_tokens, seed=seed)

    @property
    def refused(self) -> str | None:
        """Why the written-out pass does not score this model, ``None`` as long as nothing speaks against it."""
        return self._pass_refused

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step."""
        rows = StepRows.of(self._data, self._steps, step)
        # One backward pass needs no gradient buffer; several must be summed before the absolute value.
        one_pass = self._steps.fresh and len(rows.batches) == 1
        with deterministic():
            if rows.questions.places:
                rows = self._compared(rows)
            able = one_pass if self._score == "absolute" else self._score == "second-order"
            written_out = self._written_out(rows.numbers) if able else None
            if written_out is not None:
                scores, loss, tokens = self._by_written_out(written_out, groups, rows)
            else:
                if self._fp8:
                    reason = self._pass_refused or f"--batch-size {self._batch_size} makes several batches of a step"
                    of_one = " over one batch" if self._score == "absolute" else ""
                    raise GispError(f"--fp8 needs the written-out pass{of_one}: {reason}, leave it out")
                mode: Mode = "stream" if one_pass else "exact"
                if self._score != "absolute":
                    mode = self._score
                scores, loss, tokens = self._by_autograd(groups, rows, mode)
            if self._score == "second-order":
                scores = self._loss_changes(scores, rows, step)
        return StepScores.of(scores, loss + rows.correction, tokens)

    def _compared(self, rows: StepRows) -> StepRows:
        """The rows with the weights that the answers' likelihoods give those of questions, by a forward pass."""
        run = self._written_out(rows.numbers)
        parts = [[i for i in rows.led(*batch) if i in rows.questions.owners] for batch in rows.batches]
        if run is None:
            parts = list(self._steps.small(rows.numbers, [i for part in parts for i in part]))
        found, owners = [], []
        with torch.no_grad(), evaluation_mode(self._model):
            for portion in (rows.portion(part, self._data) for part in parts if part):
                found.append(self._answers(run, portion))
                counts = [self._data.scored[rows.numbers[i]] for i in portion.positions]
                owners.append(torch.tensor(portion.positions).repeat_interleave(torch.tensor(counts)))
        nll = torch.zeros(len(rows.numbers), dtype=torch.float64)
        nll.index_add_(0, torch.cat(owners), torch.cat(found).double().cpu())
        tokens, signs = ([of[i] for i in rows.numbers] for of in (self._data.scored, self._data.signs))
        weights, correction = rows.questions.compare(nll, tokens, signs, rows.weights)
        return replace(rows, weights=weights, correction=correction)

    def _answers(self, run: ImportancePass | None, portion: Portion) -> torch.Tensor:
        """NLL of the scored tokens of a portion, then of its further answers."""
        if run is not None:
            return run.token_nll(portion.ids, portion.labels, portion.further)
        ids, labels = portion.ids.to(self._device), portion.labels.to(self._device)
        return torch.cat(answer_nll(self._model, ids, labels, *self._places(portion.further)))

    def _places(self, further: FurtherAnswers | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and tokens of further answers, int64 [M] each."""
        pairs = [further.rows, further.tokens] if further is not None else [[], []]
        rows, tokens = torch.tensor(pairs, dtype=torch.int64, device=self._device)
        return rows, tokens

    def _loss_changes(self, sums: dict[str, torch.Tensor], rows: StepRows, step: int) -> dict[str, torch.Tensor]:
        """Predicted changes of the loss from sums over all sequences of a step."""
        # One unit tells nothing of its noise, and of sequences of both signs only differences should count.
        if not sums or not self._shrunk or rows.units < 2 or rows.opposed:
            return {name: loss_change(values) for name, values in sums.items()}
        batches = averaged_batches(self._ema, step) if self._steps.fresh else 1.0
        # Data seen again brings no new noise to average.
        batches = min(batches, max(1.0, len(self._data.rows) / len(rows.numbers)))
        trust = first_order_weights(sums, rows.units, batches)
        return {name: loss_change(values, trust[name]) for name, values in sums.items()}

    def _by_written_out(
        self, run: ImportancePass, groups: list[StructureGroup], rows: StepRows
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
        scored = [(group.name, group.count) for group in groups]
        total: dict[str, torch.Tensor] = {}
        loss, tokens = torch.zeros((), dtype=torch.float64, device=self._device), 0
        for batch in rows.batches:
            led = rows.led(*batch)
            portion = rows.portion(led, self._data)
            ids, labels, weights, further = portion.ids, portion.labels, portion.weights, portion.further
            if self._score == "second-order":
                found, part = run.gate_sums(ids, labels, weights, scored, rows.units_of(led, labels), further)
            else:
                found, part = run.score(ids, labels, weights, scored, further)
            total = {name: total[name] + values for name, values in found.items()} if total else found
            loss += part
            tokens += ids.numel()
        return total, loss, tokens

    def _by_autograd(
        self, groups: list[StructureGroup], rows: StepRows, mode: Mode
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        tokens = 0
        with frozen(self._model), record_importance(groups, mode=mode) as recorder:
            for batch in rows.batches:
                led = rows.led(*batch)
                portion = rows.portion(led, self._data)
                ids, labels = portion.ids.to(self._device), portion.labels.to(self._device)
                weight = torch.tensor(portion.weights, device=self._device)
                units = rows.units_of(led, portion.labels)
                if units is None:
                    recorder.curvature = sequence_curvature(labels, weight)
                else:
                    recorder.curvature, recorder.units = (t.to(self._device) for t in (units.curvature, units.index))
                loss = self._loss_of(portion, ids, labels, weight)
                # A block of a layer without any live structure passes no gradient on.
                if loss.requires_grad:
                    loss.backward()
                elif self._loss is not None and groups:
                    raise GispError(
                        "the loss of your own has no gradient: compute it with gradients enabled and without detach()"
                    )
                total += loss.detach()
                tokens += ids.numel()
            return recorder.gate_sums() if mode == "second-order" else recorder.scores(), total, tokens

    def _loss_of(self, portion: Portion, ids: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The weighted loss of a portion, 0-dim with its graph."""
        if self._loss is not None:
            return (own_losses(self._loss, self._model, ids, labels) * weight).sum()
        if portion.further is None:
            return (sequence_nll(self._model, ids, labels) * weight).sum()
        shares = torch.tensor(portion.further.weights, device=self._device)
        own, others = answer_nll(self._model, ids, labels, *self._places(portion.further))
        tokens = (labels[:, 1:] != IGNORED).sum(1)
        return (own * (weight / tokens).repeat_interleave(tokens)).sum() + (others * shares).sum()

    def _written_out(self, numbers: list[int]) -> ImportancePass | None:
        """The written-out pass, if it computes what the model computes; compared once, on the first sequence."""
        if self._pass is None and self._pass_refused is None:
            longest = max(len(ids) for ids, _ in self._data.rows)
            self._pass_refused = why_not(self._map, longest)
            if self._pass_refused is None:
                candidate = ImportancePass(self._map)
                ids = self._data.batch(numbers[:1])[0]
                with evaluation_mode(self._model):
                    distance = differs(self._model, candidate.hidden_states(ids), ids)
                if distance is None:
                    self._pass = ImportancePass(self._map, Float8Products()) if self._fp8 else candidate
                else:
                    self._pass_refused = f"its last hidden state is off by {distance:.1e}"
        return self._pass
