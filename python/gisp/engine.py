"""The two ways to score a step: ``stream`` (one fresh batch, no gradient buffer) and ``exact`` (the whole set)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gisp.criteria.choices import ScoreKind
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.first_order import averaged_batches, first_order_weights
from gisp.fused_pass import Float8Products, ImportancePass, differs, why_not
from gisp.modes import deterministic, evaluation_mode, frozen
from gisp.objectives import (
    IGNORED,
    SequenceLoss,
    answer_nll,
    objective_name,
    own_losses,
    sequence_curvature,
    sequence_nll,
)
from gisp.step_batches import StepBatches
from gisp.step_rows import StepRows
from gisp.structures import ModelMap
from gisp_kernels import float8, loss_change, record_importance
from gisp_kernels.groups import StructureGroup
from gisp_kernels.record import Mode


@dataclass(frozen=True)
class StepScores:
    """Scores of one step. Nothing here has waited for the GPU.

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

    A step of one batch, and any step of second-order scores, runs the written-out pass of :mod:`gisp.fused_pass` where
    the model's layout allows it, any other step autograd over the model with recorded Linear layers.

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
        shrunk: ``second-order`` alone: the first-order term shrunk by its noise (:mod:`gisp.first_order`).
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

    @torch.no_grad()
    def _compared(self, rows: StepRows) -> StepRows:
        """The rows with the weights that the answers' likelihoods give those of questions, by a forward pass."""
        nll = torch.zeros(len(rows.numbers), dtype=torch.float64)
        led: dict[int, list[int]] = {}
        for i in (i for place in rows.questions.places for i in place):
            led.setdefault(rows.leaders[i], []).append(i)
        with evaluation_mode(self._model):
            for part in self._steps.small(rows.numbers, [*led]):
                ids, labels = self._data.batch([rows.numbers[i] for i in part])
                others = [(number, i) for number, leader in enumerate(part) for i in led[leader] if i != leader]
                tokens = [int(self._data.rows[rows.numbers[i]][0][-1]) for _, i in others]
                inputs = (
                    ids,
                    labels,
                    torch.tensor([number for number, _ in others]).long(),
                    torch.tensor(tokens).long(),
                )
                found = answer_nll(self._model, *(tensor.to(self._device) for tensor in inputs))
                nll[part + [i for _, i in others]] = torch.cat(found).double().cpu()
        counts = [int((self._data.rows[i][1][1:] != IGNORED).sum()) for i in rows.numbers]
        signs = [self._data.signs[i] for i in rows.numbers]
        weights, correction = rows.questions.compare(nll, counts, signs, rows.weights)
        return replace(rows, weights=weights, correction=correction)

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
        for start, stop in rows.batches:
            positions = range(start, stop)
            led = rows.led(positions)
            ids, labels = self._data.batch([rows.numbers[i] for i in led])
            weights, further = [rows.weights[i] for i in led], rows.further(positions, led, self._data)
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
            for start, stop in rows.batches:
                ids, labels = self._data.batch(rows.numbers[start:stop])
                weight = torch.tensor(rows.weights[start:stop], device=self._device)
                recorder.curvature = sequence_curvature(labels.to(self._device), weight)
                units = rows.units_of([*range(start, stop)], labels)
                if units is not None:
                    recorder.curvature, recorder.units = units.curvature, units.index
                losses = self._losses(ids.to(self._device), labels.to(self._device))
                loss = (losses * weight).sum()
                # A block of a layer without any live structure passes no gradient on.
                if loss.requires_grad:
                    loss.backward()
                total += loss.detach()
                tokens += ids.numel()
            return recorder.gate_sums() if mode == "second-order" else recorder.scores(), total, tokens

    def _losses(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._loss is None:
            return sequence_nll(self._model, ids, labels)
        return own_losses(self._loss, self._model, ids, labels)

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
