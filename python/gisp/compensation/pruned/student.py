"""The pruned model inside the dense one: measured against it, and differentiated towards it.

The dense model's weights are never written. While the pruned model passes a layer, its pruned blocks compute otherwise
(:mod:`gisp.compensation.pruned.projections`). All batches of a pass go through a layer before the next one, so that
layers in host memory come once a pass. Passes are fused ones where the layout allows it, unless what is trained needs a
graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from gisp.compensation.acceptance import HeldOut, Measured, Texts, make_limits
from gisp.compensation.pruned.batch_sizes import BatchSizes
from gisp.compensation.pruned.fused import FusedPasses
from gisp.compensation.pruned.predictions import Predictions
from gisp.compensation.pruned.projections import Forward, Move, Observer, Projection, Traced, Value
from gisp.compensation.streams import Batch, make_batches, next_tokens
from gisp.data import Row, Sequences
from gisp.errors import GispError
from gisp.model.keep import Keep
from gisp.model.modes import replaced_forward
from gisp.model.structures import ModelMap
from gisp.offload.passes import Inside, LayerwisePasses, as_it_is
from gisp.offload.stream import resident_or_streamed
from gisp.replicas.sharing import sharers
from gisp.score.fused import ImportancePass, differs, why_not
from gisp.score.fused.block import Wanted

ValueOf = Callable[[int], Value]
"""What the projection of a number computes with."""


class Student:
    """The pruned model inside the dense one, and its divergence ``KL(dense || pruned)`` of the next token.

    Memory beside the dense model: output projections of pruned blocks at the kept width in float32, where their layers
    lie; one layer's kept weights once more while the pruned model passes it.

    Attributes:
        device: computes; layers may lie in host memory.
        projections: output projections of pruned blocks, in the order of the layers.
    """

    def __init__(self, model_map: ModelMap, keep: Keep, longest: int | None = None) -> None:
        """
        Args:
            keep: what stays.
            longest: tokens of the longest sequence, which the fused pass is asked about; None to do without it.
        """
        self._map, self._model, self._longest = model_map, model_map.model, longest
        self._fused: FusedPasses | None = None
        self._head = self._model.get_output_embeddings()
        embeddings = self._model.get_input_embeddings().weight
        self.device = embeddings.device
        self._predictions = Predictions(self._head, self.device)
        visits = resident_or_streamed(self._model)
        self._passes = LayerwisePasses(self._model, visits)
        self._layers = len(model_map.layers)
        self._sizes = BatchSizes.of(model_map, embeddings, recomputes=visits.recomputes)
        self.projections: list[Projection] = []
        for item in model_map.layers:
            kept = keep.columns(item.index, model_map.head_dim)
            for group, columns in zip((item.heads, item.channels), kept, strict=True):
                projection = Projection.of(model_map, item, group.name, columns, self.device)
                if projection is not None:
                    self.projections.append(projection)

    def moved(self, moves: Sequence[Move], size: float) -> ValueOf:
        """What every projection computes with after its move of some size."""
        return lambda number: self.projections[number].value(moves[number], size)

    def move(self, moves: Sequence[Move], size: float) -> None:
        """Take the moves of all projections.

        Raises:
            GispError: weights that are not finite.
        """
        for projection, move in zip(self.projections, moves, strict=True):
            projection.move(move, size)

    @property
    def movable(self) -> list[Projection]:
        """Projections that have columns left."""
        return [projection for projection in self.projections if len(projection.columns)]

    def hold_out(self, data: Sequences, beside: Sequences | None = None) -> tuple[HeldOut, Measured]:
        """Held-out sequences with what the dense model makes of them, limited by the pruned model's loss as it is.

        Args:
            beside: held-out text of the run that the model was pruned in, apart from the data.

        Returns:
            Beside them the pruned model as :meth:`measure` finds it.

        Raises:
            GispError: the model makes its logits otherwise.
        """
        own, other = self._texts(data), None if beside is None else self._texts(beside)
        self._check(own.batches[0])
        self._choose(own.batches[0])
        numbers = list(own.targets)
        dense = self._states([own.batches[number] for number in numbers])
        held_out = HeldOut(**vars(own), dense=dict(zip(numbers, dense, strict=True)), beside=other)
        found, losses = self._measured(held_out, self._own)
        limited = replace(held_out, limits=make_limits(own, other, losses))
        return limited, limited.measured(found, losses)

    def _texts(self, data: Sequences) -> Texts:
        """Sequences in batches, their examples as texts."""
        of_row = torch.zeros(len(data.rows), dtype=torch.int64)
        for number, example in enumerate(data.examples):
            of_row[list(example)] = number
        lengths = torch.tensor([len(ids) for ids, _ in data.rows], dtype=torch.float64)
        scores = [n if sign > 0 else 0 for n, sign in zip(data.scored, data.signs, strict=True)]
        tokens, scored = (
            torch.zeros(len(data.examples), dtype=torch.float64).index_add_(0, of_row, values)
            for values in (lengths, torch.tensor(scores, dtype=torch.float64))
        )
        batches = make_batches([ids for ids, _ in data.rows], self.device, per_batch=self._sizes.measured_tokens)
        targets = {number: next_tokens(batches[number], data) for number in sharers().share(len(batches))}
        return Texts(batches, of_row, tokens, scored, targets, data.kinds)

    def groups(self, rows: Sequence[Row], *, graphs: bool = True) -> list[list[Batch]]:
        """All tokens of rows in batches, grouped by what there is room for in a backward pass.

        Args:
            graphs: whether it is one of autograd.
        """
        own = self._sizes
        tokens, count = (own.tokens, own.together) if graphs else (own.fused_tokens, own.fused_together)
        batches = make_batches([ids for ids, _ in rows], self.device, per_batch=tokens)
        return [batches[first : first + count] for first in range(0, len(batches), count)]

    def measure(self, held_out: HeldOut, value_of: ValueOf) -> Measured:
        """The pruned model against the dense one on held-out text.

        Args:
            value_of: what the projection of a number computes with.
        """
        return held_out.measured(*self._measured(held_out, value_of))

    @torch.no_grad()
    def _measured(self, held_out: HeldOut, value_of: ValueOf) -> list[torch.Tensor]:
        """Divergence, float64 [U], and loss, with that of the text beside behind it."""
        beside = held_out.beside
        texts = [held_out] if beside is None else [held_out, beside]
        # In one pass: layers in host memory come once.
        found = iter(self._states([text.batches[number] for text in texts for number in text.targets], value_of))
        states = [{number: next(found) for number in text.targets} for text in texts]

        def values_of(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            here = states[0].pop(number)
            return self._predictions.divergences(here, held_out.dense[number], held_out.targets[number])

        divergences, losses = held_out.totals(values_of)
        if beside is None:
            return [divergences, losses]

        def losses_of(number: int) -> tuple[torch.Tensor]:
            return (self._predictions.losses(states[1].pop(number), beside.targets[number]),)

        return [divergences, torch.cat([losses, *beside.totals(losses_of)])]

    def backward(self, rows: Sequence[Row], traced: Sequence[Traced], scale: float) -> None:
        """A backward pass of the rows' divergence, summed over tokens and multiplied by ``scale``.

        Args:
            traced: what it finds at every projection; their tensors and observers receive gradients.
        """
        graphs = self._fused is None or any(own.weight is not None or own.gates is not None for own in traced)
        for batches in self.groups(rows, graphs=graphs):
            if graphs:
                self._by_autograd(batches, traced, scale)
            else:
                self._by_fused_pass(self._fused, batches, traced, scale)

    def _by_fused_pass(
        self, fused: FusedPasses | None, batches: Sequence[Batch], traced: Sequence[Traced], scale: float
    ) -> None:
        assert fused is not None
        goals = self._states(batches)
        observers: dict[int, Observer] = {}

        def wanted_of(batch: Batch) -> dict[str, Wanted]:
            def observed(number: int) -> Wanted:
                def observe(inputs: torch.Tensor, gradients: torch.Tensor) -> None:
                    both = (tokens.unflatten(0, batch.ids.shape) for tokens in (inputs, gradients))
                    observers[number](*(batch.tokens(tokens) for tokens in both))

                return Wanted(observe=observe)

            return {
                p.name: observed(n) for n, p in enumerate(self.projections) if traced[n].observing and len(p.columns)
            }

        def gradient_of(number: int, states: torch.Tensor) -> torch.Tensor:
            batch = batches[number]
            found = self._predictions.gradient(batch.tokens(states), goals[number], scale)
            if batch.real is None:
                return found.view_as(states)
            # Nothing reads what stands behind the end of a sequence.
            gradient = torch.zeros_like(states)
            gradient[batch.real] = found
            return gradient

        ids, wanted = [batch.ids for batch in batches], [wanted_of(batch) for batch in batches]
        fused.run(ids, gradient_of, wanted, self._shown(self._own), partial(self._observed, traced, observers))

    def _by_autograd(self, batches: Sequence[Batch], traced: Sequence[Traced], scale: float) -> None:
        ids = [batch.ids for batch in batches]
        goals = [batch.tokens(states) for batch, states in zip(batches, self._passes.states(ids), strict=True)]
        observers: dict[int, Observer] = {}
        passing = batches[0]

        def forward(number: int) -> Forward:
            def observe(inputs: torch.Tensor, gradients: torch.Tensor) -> None:
                observers[number](passing.tokens(inputs), passing.tokens(gradients))

            own = traced[number]
            return self.projections[number].traced(own, observe if own.observing else None)

        @contextlib.contextmanager
        def recorded(layer: int) -> Iterator[Callable[[int], None]]:
            def passes(number: int) -> None:
                nonlocal passing
                passing = batches[number]

            with self._observed(traced, observers, layer):
                yield passes

        def loss_of(number: int) -> torch.Tensor:
            batch = batches[number]
            states = batch.tokens(self._model.model(input_ids=batch.ids, use_cache=False).last_hidden_state)
            gradient = self._predictions.gradient(states.detach(), goals[number], scale)
            # Its gradient in the states is the one that is known.
            return (states * gradient).sum()

        lowest = min((projection.layer for projection in self.movable), default=self._layers)
        self._passes.run(ids, loss_of, lowest, recorded, self._replaced(forward), graphs=self._sizes.graphs)

    @contextlib.contextmanager
    def _observed(self, traced: Sequence[Traced], observers: dict[int, Observer], layer: int) -> Iterator[None]:
        """The observers of a layer take in tokens for a while."""
        with contextlib.ExitStack() as stack:
            for number, projection in enumerate(self.projections):
                observing = traced[number].observing
                if projection.layer == layer and observing is not None:
                    observers[number] = stack.enter_context(observing())
            yield

    def _states(self, batches: Sequence[Batch], value_of: ValueOf | None = None) -> list[torch.Tensor]:
        """What the head reads of every real token, [T, D] of every batch, without gradients.

        Args:
            value_of: of the projection of a number in the pruned model; None for the dense model.
        """
        ids = [batch.ids for batch in batches]
        if self._fused is not None:
            found = self._fused.states(ids, as_it_is if value_of is None else self._shown(value_of))
        elif value_of is None:
            found = self._passes.states(ids)
        else:
            found = self._passes.states(ids, self._replaced(lambda n: self.projections[n].plain(value_of(n))))
        return [batch.tokens(states) for batch, states in zip(batches, found, strict=True)]

    @torch.no_grad()
    def _choose(self, batch: Batch) -> None:
        """Pass by the fused layers where they compute what the model computes."""
        if self._longest is None or why_not(self._map, self._longest) is not None:
            return
        ids = batch.ids[:1]
        if differs(self._model, ImportancePass(self._map).streams(ids), ids) is None:
            self._fused = FusedPasses(self._map)

    @torch.no_grad()
    def _check(self, batch: Batch) -> None:
        first = Batch(batch.ids[:1], None if batch.real is None else batch.real[:1], batch.rows[:1])
        logits = first.tokens(self._model(input_ids=first.ids, use_cache=False).logits)
        found = self._head(self._states([first])[0])
        for tensor in (logits, found):
            if not bool((tensor < math.inf).all()):
                raise GispError("the model's predictions are not finite: check the weights and the data")
        if not torch.allclose(found.float(), logits.float(), rtol=0.02, atol=0.02):
            raise GispError(
                "the logits are not the head's product with the last states: this model type has no "
                "divergence to hold a compensation against and cannot be compensated"
            )

    def _own(self, number: int) -> Value:
        return self.projections[number].value()

    def _shown(self, value_of: ValueOf) -> Inside:
        """The modules of a layer show the pruned model with these values of its projections, for a while."""
        return self._inside(lambda number: (self.projections[number].showing(value_of(number)),))

    def _replaced(self, forward_of: Callable[[int], Forward]) -> Inside:
        """The modules of a layer compute as the pruned model does, with these forwards of its projections."""

        def entered(number: int) -> tuple[contextlib.AbstractContextManager[None], ...]:
            projection = self.projections[number]
            return projection.computed.computing(), replaced_forward(projection.linear, forward_of(number))

        return self._inside(entered)

    def _inside(self, entered: Callable[[int], tuple[contextlib.AbstractContextManager[None], ...]]) -> Inside:
        """What is entered for every projection of a layer while it is passed."""

        @contextlib.contextmanager
        def inside(layer: int) -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                for number, projection in enumerate(self.projections):
                    if projection.layer == layer:
                        for manager in entered(number):
                            stack.enter_context(manager)
                yield

        return inside
