"""K-FAC steps after least squares: output projections moved towards the dense model's predictions.

Least squares brings residual streams back, whichever deviations the loss minds. A step here lowers the loss itself, the
divergence ``KL(dense || pruned)`` of the next token's distribution, which needs no labels. For an output projection
with kept inputs ``X`` [T, K] and gradients ``g`` [T, D] of the divergence in its outputs it is the gradient step with
K-FAC's factors, the empirical Fisher information of these gradients (Martens and Grosse, arXiv 1503.05671; for pruned
language models LLM Surgeon, arXiv 2312.17244)::

    dW = -s (G + lambda_G I)^-1 C (A + lambda_A I)^-1,   A = X^T X / T,  G = g^T g / T,  C = g^T X / T

with every ``lambda`` the damping times the mean diagonal. All blocks move at once. As their steps add up, one size
``s`` for all of them is searched on calibration text that the step has not seen, and is 0 where none helps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from gisp.compensation.fits import ridge
from gisp.compensation.options import CompensationOptions
from gisp.compensation.streams import Batch, make_batches
from gisp.compensation.sweep import BlockUpdate
from gisp.data import Row, Sequences
from gisp.errors import GispError
from gisp.model.modes import deterministic, exact_products, frozen
from gisp.model.structures import ModelMap
from gisp_kernels.ops.products import add_product, product_total

# Activations of a batch are kept for the backward pass at the dense width: roughly 64 bytes per layer and dimension of
# the stream, and some copies of the logits in float32.
_TOKENS_PER_BATCH, _LEAST_TOKENS, _MOST_TOKENS, _BATCH_BYTES = 2048, 256, 16384, 2**33
# For the dense model's logits of the held-out text, which every size that is tried is compared with.
_LOGITS_BYTES = 2**32
# The first size tried, divided by the number of blocks. It shrinks until it helps, then grows or shrinks while that
# helps more: a size a little too large loses all.
_FIRST_SIZE, _GROWTH, _SHRINKING, _TRIALS = 0.5, 1.5, 0.5, 12


@dataclass(frozen=True)
class KfacStep:
    """One step of ``kfac``.

    Attributes:
        size: the factor ``s``, 0 where no size lowered the divergence.
        tokens: calibration tokens its direction was taken from.
        before, after: divergence from the dense model in nats a token, on calibration text held out from all steps.
        damping: the largest that a block's solver needed.
        raised: number of blocks that needed more damping than was asked for.
    """

    size: float
    tokens: int
    before: float
    after: float
    damping: float
    raised: int


def kfac_updates(
    model_map: ModelMap,
    updates: list[BlockUpdate],
    data: Sequences,
    held_out: Sequences,
    options: CompensationOptions,
) -> tuple[list[BlockUpdate], list[KfacStep]]:
    """Updates of the same blocks after ``options.steps`` steps; what lost nothing stays as it was.

    Every step takes the next ``options.tokens`` tokens behind those before it, from the start again where the data
    end. Memory beside the dense model: its output projections once more, at the kept width twice in float32 and
    once in its dtype, ``K*K + D*D`` floats per block, a batch's activations for a backward pass, and up to 4 GiB of
    logits. Time per step: two forward passes and a backward pass without weight gradients, and per size tried one
    forward pass over the held-out text (two over what its logits left no room for).

    Args:
        model_map: map of the dense model, which is left as it was.
        updates: of :func:`gisp.compensation.sweep.fit_updates`, without biases.
        data: calibration sequences; their first ``options.tokens`` tokens made the updates.
        held_out: others, for the size of the steps.

    Raises:
        GispError: activations that are not finite.
    """
    if not any(len(update.columns) for update in updates):
        return updates, []
    seen = data.rows
    size = 0.0
    steps = []
    with deterministic(), frozen(model_map.model), exact_products():
        student = _Student(model_map, updates)
        held_out_batches = student.beside_dense(_batches(model_map, held_out.rows))
        before = student.divergence(held_out_batches, [], 0.0)
        if not math.isfinite(before):
            raise GispError("the model's predictions are not finite: check the weights and the data")
        # Least squares has had the first tokens.
        begin = _behind(seen, 0, options.tokens)
        for _ in range(options.steps):
            end = _behind(seen, begin, options.tokens)
            rows = [seen[number % len(seen)] for number in range(begin, end)]
            tokens = sum(len(ids) for ids, _ in rows)
            directions, dampings = student.directions(_batches(model_map, rows), tokens, options.damping)
            first = size or _FIRST_SIZE / len(directions)
            size, after = _search(partial(student.divergence, held_out_batches, directions), first, before)
            student.move(size, directions)
            raised = sum(damping > options.damping for damping in dampings)
            steps.append(KfacStep(size, tokens, before, after, max(dampings), raised))
            before, begin = after, end
    return student.updates(), steps


def _behind(rows: Sequence[Row], begin: int, tokens: int) -> int:
    """Number of the row behind ``tokens`` tokens from row ``begin`` on, at least one row and at most all of them."""
    end = begin
    while end < begin + len(rows) and tokens > 0:
        tokens -= len(rows[end % len(rows)][0])
        end += 1
    return end


def _batches(model_map: ModelMap, rows: Sequence[Row]) -> list[Batch]:
    weight = model_map.model.get_input_embeddings().weight
    most = _TOKENS_PER_BATCH
    if weight.device.type == "cuda":
        per_token = 64 * len(model_map.layers) * weight.shape[1] + 28 * weight.shape[0]
        most = min(max(_LEAST_TOKENS, _BATCH_BYTES // per_token), _MOST_TOKENS)
    return make_batches(Sequences.plain([*rows]), sum(len(ids) for ids, _ in rows), weight.device, per_batch=most)


def _search(value: Callable[[float], float], first: float, before: float) -> tuple[float, float]:
    """A step size with a value below ``before``, and the value; (0, ``before``) where none is found."""
    size, best = first, value(first)
    trials = 1
    # A value that is not a number is not below either.
    while not best < before:
        if trials == _TRIALS:
            return 0.0, before
        size *= _SHRINKING
        best = value(size)
        trials += 1
    start = size
    for factor in (_GROWTH, 1 / _GROWTH):
        while True:
            if trials == _TRIALS:
                return size, best
            found = value(size * factor)
            trials += 1
            if not found < best:
                break
            size, best = size * factor, found
        if size != start:
            break
    return size, best


@dataclass
class _Projection:
    """An output projection of the pruned model.

    Attributes:
        weight: of the kept columns, float32 [D, K]; the model computes with it rounded to its dtype.
        dense, pruned: whole weights [D, width] of the two models.
    """

    update: BlockUpdate
    linear: nn.Linear
    columns: torch.Tensor
    weight: torch.Tensor
    dense: torch.Tensor
    pruned: torch.Tensor


class _Moments:
    """Second moments of one projection's kept inputs and output gradients: A [K, K], G [D, D], C [D, K], float32.

    They make a direction whose size is searched, and tolerate the bits that products of 16-bit factors drop.
    """

    def __init__(self, projection: _Projection) -> None:
        self.rows, self.columns = projection.weight.shape
        self.inputs, self.outputs, self.cross = (
            product_total(m, n, projection.weight.device)
            for m, n in ((self.columns, self.columns), (self.rows, self.rows), (self.rows, self.columns))
        )

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Take in tokens: inputs [T, K], gradients [T, D], in the model's dtype."""
        add_product(self.inputs, inputs, inputs)
        add_product(self.outputs, gradients, gradients)
        add_product(self.cross, gradients, inputs)

    def direction(self, tokens: int, damping: float) -> tuple[torch.Tensor, float]:
        """The step of size 1, float32 [D, K], and the larger of the two dampings it took."""
        rows, columns = self.rows, self.columns
        cross = self.cross[:rows, :columns].double() / tokens
        half, one = ridge(self.inputs[:columns, :columns].double() / tokens, cross, damping)
        whole, other = ridge(self.outputs[:rows, :rows].double() / tokens, half.T, damping)
        return -whole.T.float(), max(one, other)


class _Student:
    """The pruned model inside the dense one, at its dense width: removed columns of output projections are zero."""

    def __init__(self, model_map: ModelMap, updates: list[BlockUpdate]) -> None:
        self._model = model_map.model
        self._projections = []
        outputs = model_map.outputs
        for update in updates:
            linear, _ = outputs[update.name]
            columns = update.columns.to(linear.weight.device)
            old = linear.weight.detach()[:, columns] if update.weight is None else update.weight
            weight = old.to(torch.float32, copy=True)
            dense = linear.weight.data
            projection = _Projection(update, linear, columns, weight, dense, torch.zeros_like(dense))
            projection.pruned[:, columns] = old
            self._projections.append(projection)

    @property
    def _movable(self) -> list[_Projection]:
        return [projection for projection in self._projections if len(projection.columns)]

    def updates(self) -> list[BlockUpdate]:
        """What the blocks have now."""
        return [
            replace(projection.update, weight=projection.weight.to(projection.linear.weight.dtype))
            if len(projection.columns)
            else projection.update
            for projection in self._projections
        ]

    def move(self, size: float, directions: list[torch.Tensor]) -> None:
        """Take a step; one of size 0 leaves the weights as they were before sizes were tried.

        Raises:
            GispError: weights that are not finite.
        """
        for projection, direction in zip(self._movable, directions, strict=True):
            if size:
                projection.weight.add_(direction, alpha=size)
            projection.pruned[:, projection.columns] = projection.weight.to(projection.pruned.dtype)
            if not bool(torch.isfinite(projection.weight).all()):
                raise GispError(
                    f"compensated weights of {projection.update.name} are not finite: check the weights and the data"
                )

    @torch.no_grad()
    def beside_dense(self, batches: list[Batch]) -> list[tuple[Batch, torch.Tensor | None]]:
        """Batches with the dense model's logits [T, V], as far as there is room for them."""
        found: list[tuple[Batch, torch.Tensor | None]] = []
        room = _LOGITS_BYTES
        for batch in batches:
            logits = self._logits(batch) if room > 0 else None
            room -= 0 if logits is None else logits.nbytes
            found.append((batch, logits if room >= 0 else None))
        return found

    @torch.no_grad()
    def divergence(
        self, batches: list[tuple[Batch, torch.Tensor | None]], directions: list[torch.Tensor], size: float
    ) -> float:
        """KL(dense || pruned) in nats a token, after a step that is tried; no directions: as the model is.

        Args:
            batches: of :meth:`beside_dense`.
        """
        for projection, direction in zip(self._movable, directions, strict=bool(directions)):
            tried = torch.add(projection.weight, direction, alpha=size)
            projection.pruned[:, projection.columns] = tried.to(projection.pruned.dtype)
        total, tokens = 0.0, 0
        for batch, dense in batches:
            wanted = _log_probabilities(self._logits(batch) if dense is None else dense)
            with self._in_place():
                found = _log_probabilities(self._logits(batch))
            total += float(_kl_div(found, wanted))
            tokens += len(wanted)
        return total / tokens

    def directions(self, batches: list[Batch], tokens: int, damping: float) -> tuple[list[torch.Tensor], list[float]]:
        """Steps of size 1 of all movable blocks, each in place of the moments it is made of, and their dampings."""
        found: list[Any] = [_Moments(projection) for projection in self._movable]
        for batch in batches:
            with torch.no_grad():
                wanted = _log_probabilities(self._logits(batch))
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._in_place())
                stack.enter_context(torch.enable_grad())
                for projection, moments in zip(self._movable, found, strict=True):
                    handle = projection.linear.register_forward_hook(_observer(projection, moments, batch))
                    stack.callback(handle.remove)
                _kl_div(_log_probabilities(self._logits(batch)), wanted).backward()
        dampings = []
        for number, projection in enumerate(self._movable):
            try:
                found[number], needed = found[number].direction(tokens, damping)
                dampings.append(needed)
            except ArithmeticError as error:
                raise GispError(f"{projection.update.name} cannot be compensated: {error}") from None
        return found, dampings

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        try:
            for projection in self._projections:
                projection.linear.weight.data = projection.pruned
            yield
        finally:
            for projection in self._projections:
                projection.linear.weight.data = projection.dense

    def _logits(self, batch: Batch) -> torch.Tensor:
        """Of the token after each real one, [T, V] in the model's dtype."""
        return batch.tokens(self._model(input_ids=batch.ids, use_cache=False).logits)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Float32 [T, V]; finite, as models may rule out tokens (logits of -inf)."""
    return logits.float().log_softmax(-1).clamp_min(torch.finfo(torch.float32).min)


def _kl_div(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Divergence of log probabilities [T, V] from wanted ones, summed over tokens."""
    return nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)


def _observer(projection: _Projection, moments: _Moments, batch: Batch) -> Any:
    """A forward hook that takes in a projection's inputs with the gradient of its output."""

    def forward(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs = args[0].detach()[..., projection.columns]
        if not output.requires_grad:
            # The first block: nothing before it needs a gradient.
            output.requires_grad_(True)
        output.register_hook(lambda gradient: moments.add(batch.tokens(inputs), batch.tokens(gradient)))

    return forward
