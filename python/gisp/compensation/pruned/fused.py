"""Passes of the pruned and of the dense model by the layers of the fused pass, without autograd.

They keep a fraction of what a graph keeps, and their elementwise parts are fused. What a layer's modules show while it
is visited is what it computes with, at any widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from gisp.model.structures import ModelMap
from gisp.offload.boundaries import Taken
from gisp.offload.passes import Inside, as_it_is
from gisp.offload.stream import Resident, Visits, resident_or_streamed
from gisp.score.fused.batch import plain_batch
from gisp.score.fused.block import Wanted
from gisp.score.fused.layers import Flow, Layers, embedded, lowest_scored
from gisp.score.fused.memory import Kept, what_layers_keep
from gisp.score.fused.products import Products


class FusedPasses:
    """Passes of a model of the layout that :func:`gisp.score.fused.why_not` accepts."""

    def __init__(self, model_map: ModelMap) -> None:
        self._model = model_map.model
        self._visits = _Entering(resident_or_streamed(model_map.model))
        self._layers = Layers(model_map.layers, Products(), self._visits)

    @torch.no_grad()
    def states(self, ids: Sequence[torch.Tensor], inside: Inside = as_it_is) -> list[torch.Tensor]:
        """As :meth:`gisp.offload.passes.LayerwisePasses.states`."""
        count = len(self._layers)
        flows = [embedded(self._model, plain_batch(self._model.model, batch)) for batch in ids]
        with self._visits.visiting(range(count)), self._visits.entering(inside):
            self._layers.forward(flows, count, Kept())
        ends = (self._model.model.norm(_stream(flow)) for flow in flows)
        return [end.view(*batch.shape, -1) for end, batch in zip(ends, ids, strict=True)]

    @torch.no_grad()
    def run(
        self,
        ids: Sequence[torch.Tensor],
        gradient_of: Callable[[int, torch.Tensor], torch.Tensor],
        wanted: Sequence[Mapping[str, Wanted]],
        inside: Inside,
        recorded: Inside,
    ) -> None:
        """Pass batches through the model and back.

        Args:
            ids: int64 [B, S] of every batch, on the device.
            gradient_of: from the number of a batch and what the head reads of it, [B, S, D], the gradient in that.
            wanted: of every batch what backward leaves of every group that has a name here.
            inside: entered around a layer's forward and around its backward.
            recorded: entered around a layer's backward, too.
        """
        lowest = lowest_scored(self._layers.items, {name for of_batch in wanted for name in of_batch})
        flows = [embedded(self._model, plain_batch(self._model.model, batch)) for batch in ids]
        count = len(self._layers)
        kept = Kept(count)
        if not self._visits.recomputes:
            items = self._layers.items[lowest:]
            kept = what_layers_keep([(len(ids), items)], max(batch.numel() for batch in ids), ids[0].device)
        with self._visits.visiting([*range(count), count, *reversed(range(lowest, count))]):
            with self._visits.entering(inside):
                self._layers.forward(flows, lowest, kept)
            # The end of the model has the number after that of the last layer.
            with self._visits.visit(count):
                grads = [
                    self._end(flow, batch, partial(gradient_of, number))
                    for number, (flow, batch) in enumerate(zip(flows, ids, strict=True))
                ]
            with self._visits.entering(inside, recorded):
                self._layers.backward(flows, grads, wanted, lowest)

    def _end(self, flow: Flow, ids: torch.Tensor, gradient_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Gradient in the residual stream behind the last layer, [T, D]."""
        end = _stream(flow).requires_grad_()
        with torch.enable_grad():
            states = self._model.model.norm(end).view(*ids.shape, -1)
        (grad,) = torch.autograd.grad(states, end, gradient_of(states.detach()))
        return grad


class _Entering(Resident):
    """Visits of layers in which more is entered."""

    def __init__(self, visits: Visits) -> None:
        self._visits = visits
        self._inside: tuple[Inside, ...] = ()
        self.recomputes = visits.recomputes

    @contextmanager
    def entering(self, *inside: Inside) -> Iterator[None]:
        """Enter these in every layer visited meanwhile."""
        before, self._inside = self._inside, inside
        try:
            yield
        finally:
            self._inside = before

    @contextmanager
    def visiting(self, order: Iterable[int]) -> Iterator[None]:
        """As :meth:`LayerStream.visiting`."""
        with self._visits.visiting(order):
            yield

    @contextmanager
    def visit(self, layer: int) -> Iterator[None]:
        """As :meth:`LayerStream.visit`."""
        with ExitStack() as stack:
            stack.enter_context(self._visits.visit(layer))
            for inside in self._inside:
                stack.enter_context(inside(layer))
            yield

    def keep(self, layer: int, states: torch.Tensor) -> Taken:
        """As :meth:`LayerStream.keep`."""
        return self._visits.keep(layer, states)


def _stream(flow: Flow) -> torch.Tensor:
    """The residual stream behind the last layer, [T, D]; the flow holds it no longer."""
    x, delta = flow.leave()
    return x if delta is None else delta.add_(x)
