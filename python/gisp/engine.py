"""The two ways to score a step: ``stream`` (one fresh batch, no gradient buffer) and ``exact`` (the whole set)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from gisp.criteria.choices import ScoreKind
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.first_order import averaged_batches, first_order_weights
from gisp.fused_pass import Float8Products, ImportancePass, differs, why_not
from gisp.objectives import (
    IGNORED,
    SequenceLoss,
    evaluation_mode,
    objective_name,
    own_losses,
    sequence_curvature,
    sequence_nll,
)
from gisp.questions import Questions, Units
from gisp.step_batches import StepBatches
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


@dataclass(frozen=True)
class _StepRows:
    """The sequences of a step.

    Attributes:
        numbers: of the sequences, the positions of the step.
        weights: weight of each sequence's mean NLL in the loss.
        questions: those of the positions whose answers are compared.
        batches: stretches of positions that pass through the model together.
        correction: what the weighted sum of NLL lacks to the loss.
    """

    numbers: list[int]
    weights: list[float]
    questions: Questions
    batches: list[tuple[int, int]]
    correction: float = 0.0

    @classmethod
    def of(cls, data: Sequences, steps: StepBatches, step: int) -> _StepRows:
        """The rows of a step (1-based)."""
        numbers, weights, places = steps.numbers(step), steps.weights(step), steps.questions(step)
        questions = Questions.of(places, [data.signs[i] for i in numbers], weights)
        return cls(numbers, weights, questions, list(steps.batches(numbers, places)))

    @property
    def units(self) -> int:
        """Independent parts of the loss: questions and sequences that are no answers."""
        return len(self.numbers) - sum(len(place) - 1 for place in self.questions.places)

    @property
    def opposed(self) -> bool:
        """Whether sequences that are no answers of questions pull the other way."""
        answers = {i for place in self.questions.places for i in place}
        return any(weight < 0 for i, weight in enumerate(self.weights) if i not in answers)

    def units_of(self, start: int, stop: int, labels: torch.Tensor) -> Units | None:
        """What of a batch with these labels is squared as one; ``None`` where every sequence is by itself."""
        if not self.questions.places:
            return None
        return self.questions.units(start, stop, sequence_curvature(labels, torch.tensor(self.weights[start:stop])))


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
        rows = _StepRows.of(self._data, self._steps, step)
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
    def _compared(self, rows: _StepRows) -> _StepRows:
        """The rows with the weights that the answers' likelihoods give those of questions, by a forward pass."""
        nll = torch.zeros(len(rows.numbers), dtype=torch.float64)
        answers = [i for place in rows.questions.places for i in place]
        with evaluation_mode(self._model):
            for part in self._steps.small(rows.numbers, answers):
                ids, labels = self._data.batch([rows.numbers[i] for i in part])
                found = sequence_nll(self._model, ids.to(self._device), labels.to(self._device))
                nll[part] = found.double().cpu()
        tokens = [int((self._data.rows[i][1][1:] != IGNORED).sum()) for i in rows.numbers]
        signs = [self._data.signs[i] for i in rows.numbers]
        weights, correction = rows.questions.compare(nll, tokens, signs, rows.weights)
        return replace(rows, weights=weights, correction=correction)

    def _loss_changes(self, sums: dict[str, torch.Tensor], rows: _StepRows, step: int) -> dict[str, torch.Tensor]:
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
        self, run: ImportancePass, groups: list[StructureGroup], rows: _StepRows
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
        scored = [(group.name, group.count) for group in groups]
        total: dict[str, torch.Tensor] = {}
        loss, tokens = torch.zeros((), dtype=torch.float64, device=self._device), 0
        for start, stop in rows.batches:
            ids, labels = self._data.batch(rows.numbers[start:stop])
            weights = rows.weights[start:stop]
            if self._score == "second-order":
                found, part = run.gate_sums(ids, labels, weights, scored, rows.units_of(start, stop, labels))
            else:
                found, part = run.score(ids, labels, weights, scored)
            total = {name: total[name] + values for name, values in found.items()} if total else found
            loss += part
            tokens += ids.numel()
        return total, loss, tokens

    def _by_autograd(
        self, groups: list[StructureGroup], rows: _StepRows, mode: Mode
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        tokens = 0
        with frozen(self._model), record_importance(groups, mode=mode) as recorder:
            for start, stop in rows.batches:
                ids, labels = self._data.batch(rows.numbers[start:stop])
                weight = torch.tensor(rows.weights[start:stop], device=self._device)
                recorder.curvature = sequence_curvature(labels.to(self._device), weight)
                units = rows.units_of(start, stop, labels)
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


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels; the settings as before afterwards."""
    algorithms = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Attention backward passes are deterministic only in the strict mode; a warning would not make them so.
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        switches.fill_uninitialized_memory = fill


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient for any parameter; everything as before afterwards.

    With no parameter needing a gradient the backward pass ends at the first scored layer.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        with evaluation_mode(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
