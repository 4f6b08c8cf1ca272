"""The pruned model inside the dense one: its output projections read the kept columns alone, while it is asked.

The dense model's weights are never written. While the pruned model computes, the projections of pruned blocks have
another ``forward``; what is removed then reaches nothing. Logits exist for a chunk of tokens at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from gisp.compensation.acceptance import HeldOut
from gisp.compensation.streams import Batch, make_batches
from gisp.data import Row, Sequences
from gisp.errors import GispError
from gisp.model.keep import Keep
from gisp.model.modes import replaced_forward
from gisp.model.structures import ModelMap
from gisp.replicas.sharing import sharers
from gisp_kernels import gate_grads
from gisp_kernels.ops.products import add_product, product_total

# Activations of a batch are kept for the backward pass at the dense width: roughly 64 bytes per layer and dimension of
# the stream.
_TOKENS_PER_BATCH, _LEAST_TOKENS, _MOST_TOKENS, _BATCH_BYTES = 2048, 256, 16384, 2**33
# Logits of either model alive at a time, in elements; about eight float32 tensors have this size.
_LOGITS = {"cuda": 2**26, "cpu": 2**23}

Observer = Callable[[torch.Tensor, torch.Tensor], None]
Forward = Callable[[torch.Tensor], torch.Tensor]


class Value(NamedTuple):
    """Weight [D, K] and bias [D] of a projection's kept columns, in the dtype of the model; no bias: as it was."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Move(NamedTuple):
    """A change of a projection: of its weight, float32 [D, K], and of its bias, float32 [D]; None for no change."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None


NO_MOVE = Move(None, None)


@dataclass
class Projection:
    """An output projection of a pruned block.

    Attributes:
        name: of the block's group.
        columns: original input columns that stay, int64 [K].
        places: int64 [width], where a column stands among those that stay; K for removed ones.
        block: columns of one structure.
        weight: of the kept columns, float32 [D, K]; the model computes with it rounded to its dtype.
        bias: float32 [D], None for that of the dense model.
        reweighted: whether a stage has changed the weight.
        factors: float32 [K / block], where the weight is that of the dense model times one factor a structure.
    """

    name: str
    linear: nn.Linear
    columns: torch.Tensor
    places: torch.Tensor
    block: int
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    reweighted: bool = False
    factors: torch.Tensor | None = None

    @property
    def changed(self) -> bool:
        """Whether a stage has changed it."""
        return self.reweighted or self.bias is not None

    def value(self, move: Move | None = None, size: float = 1.0) -> Value:
        """What it computes with, after a move of some size."""
        weight, bias = self.weight, self.bias
        if move is not None and move.weight is not None:
            weight = torch.add(weight, move.weight, alpha=size)
        if move is not None and move.bias is not None:
            bias = torch.add(self._own_bias() if bias is None else bias, move.bias, alpha=size)
        dtype = self.linear.weight.dtype
        return Value(weight.to(dtype), None if bias is None else bias.to(dtype))

    def bias_of(self, value: Value) -> torch.Tensor | None:
        """The bias [D] of a value, or the dense model's, which may have none."""
        return self.linear.bias if value.bias is None else value.bias

    def move(self, move: Move, size: float) -> None:
        """Take a move.

        Raises:
            GispError: weights that are not finite.
        """
        if move is NO_MOVE:
            return
        if move.weight is not None:
            self.weight.add_(move.weight, alpha=size)
            self.reweighted, self.factors = True, None
        if move.bias is not None:
            self.bias = torch.add(self._own_bias() if self.bias is None else self.bias, move.bias, alpha=size)
        for what, tensor in (("weights", self.weight), ("biases", self.bias)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise GispError(f"compensated {what} of {self.name} are not finite: check the weights and the data")

    def _own_bias(self) -> torch.Tensor:
        own = self.linear.bias
        return self.weight.new_zeros(self.weight.shape[0]) if own is None else own.detach().float()


class Student:
    """The pruned model inside the dense one, and its divergence ``KL(dense || pruned)`` of the next token.

    Memory beside the dense model: output projections of pruned blocks at the kept width in float32, and once more in
    the dtype of the model while it computes.
    """

    def __init__(self, model_map: ModelMap, keep: Keep) -> None:
        self._model = model_map.model
        self._head = self._model.get_output_embeddings()
        self.device = self._model.get_input_embeddings().weight.device
        self._bytes_per_token = 64 * len(model_map.layers) * model_map.hidden_size
        self.projections: list[Projection] = []
        for item in model_map.layers:
            for group, columns in zip(
                (item.heads, item.channels), keep.columns(item.index, model_map.head_dim), strict=True
            ):
                linear, block = model_map.outputs[group.name]
                if len(columns) < linear.in_features:
                    self.projections.append(_projection(group.name, linear, columns, block))

    def values(self, moves: Sequence[Move], size: float) -> list[Value]:
        """Of every projection after its move of some size."""
        return [projection.value(move, size) for projection, move in zip(self.projections, moves, strict=True)]

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

    def hold_out(self, data: Sequences) -> HeldOut:
        """Held-out sequences with what the dense model makes of them.

        Raises:
            GispError: the model makes its logits otherwise.
        """
        units = torch.zeros(len(data.rows), dtype=torch.int64)
        for number, example in enumerate(data.examples):
            units[list(example)] = number
        lengths = torch.tensor([len(ids) for ids, _ in data.rows], dtype=torch.float64)
        tokens = torch.zeros(len(data.examples), dtype=torch.float64).index_add_(0, units, lengths)
        batches = self.batches(data.rows)
        self._check(batches[0].ids[:1])
        with torch.no_grad():
            dense = {number: self._states(batches[number]) for number in sharers().share(len(batches))}
            return HeldOut(batches, units, tokens, dense)

    def batches(self, rows: Sequence[Row]) -> list[Batch]:
        """All tokens of rows, in batches whose activations there is room for."""
        most = _TOKENS_PER_BATCH
        if self.device.type == "cuda":
            most = min(max(_LEAST_TOKENS, _BATCH_BYTES // self._bytes_per_token), _MOST_TOKENS)
        return make_batches([ids for ids, _ in rows], self.device, per_batch=most)

    @torch.no_grad()
    def divergences(self, held_out: HeldOut, values: Sequence[Value] | None = None) -> torch.Tensor:
        """Divergence from the dense model in nats, summed over the tokens of every held-out unit, float64 [U].

        Args:
            values: of every projection; None for those it has.
        """
        shown = [projection.value() for projection in self.projections] if values is None else values
        forwards = [plain_forward(p, value) for p, value in zip(self.projections, shown, strict=True)]

        def values_of(number: int) -> tuple[torch.Tensor]:
            states, wanted = self._states(held_out.batches[number]), held_out.dense[number]
            parts = [_kl_div(*self._log_probabilities(states[c], wanted[c])) for c in self._chunks(len(wanted))]
            return (torch.cat(parts),)

        with self._as_pruned(forwards):
            (totals,) = held_out.totals(values_of)
        return totals

    def backward(self, batch: Batch, forwards: Sequence[Forward], scale: float) -> None:
        """A backward pass of the batch's divergence, summed over tokens and multiplied by ``scale``.

        Args:
            forwards: of every projection; their tensors and observers receive gradients.
        """
        with torch.no_grad():
            wanted = self._states(batch)
        with torch.enable_grad(), self._as_pruned(forwards):
            states = self._states(batch)
            gradient = torch.empty_like(states)
            # The end of the pass is differentiated by chunks, so that memory does not follow tokens x vocabulary.
            for chunk in self._chunks(len(wanted)):
                part = states[chunk].detach().requires_grad_()
                total = _kl_div(*self._log_probabilities(part, wanted[chunk])).sum() * scale
                (gradient[chunk],) = torch.autograd.grad(total, part)
            states.backward(gradient)

    def _log_probabilities(self, states: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the pruned and of the dense model, float32 [t, V]; finite, as models may rule out tokens (-inf)."""
        least = torch.finfo(torch.float32).min
        with torch.no_grad():
            goal = self._head(wanted).float().log_softmax(-1).clamp_min(least)
        return self._head(states).float().log_softmax(-1).clamp_min(least), goal

    def _chunks(self, tokens: int) -> Iterator[slice]:
        most = max(1, _LOGITS["cuda" if self.device.type == "cuda" else "cpu"] // self._head.weight.shape[0])
        return (slice(start, start + most) for start in range(0, tokens, most))

    def _states(self, batch: Batch) -> torch.Tensor:
        """What the head reads of every real token, [T, D]."""
        return batch.tokens(self._model.model(input_ids=batch.ids, use_cache=False).last_hidden_state)

    @torch.no_grad()
    def _check(self, ids: torch.Tensor) -> None:
        logits = self._model(input_ids=ids, use_cache=False).logits
        found = self._head(self._model.model(input_ids=ids, use_cache=False).last_hidden_state)
        for tensor in (logits, found):
            if not bool((tensor < math.inf).all()):
                raise GispError("the model's predictions are not finite: check the weights and the data")
        if not torch.allclose(found.float(), logits.float(), rtol=0.02, atol=0.02):
            raise GispError(
                "the logits are not the head's product with the last states: this model type has no "
                "divergence to hold a compensation against and cannot be compensated"
            )

    @contextlib.contextmanager
    def _as_pruned(self, forwards: Sequence[Forward]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for projection, forward in zip(self.projections, forwards, strict=True):
                stack.enter_context(replaced_forward(projection.linear, forward))
            yield


def _projection(name: str, linear: nn.Linear, columns: torch.Tensor, block: int) -> Projection:
    weight = linear.weight.detach()
    columns = columns.to(weight.device)
    places = torch.full((linear.in_features,), len(columns), device=weight.device)
    places[columns] = torch.arange(len(columns), device=weight.device)
    return Projection(name, linear, columns, places, block, weight[:, columns].to(torch.float32, copy=True))


def plain_forward(projection: Projection, value: Value) -> Forward:
    """The projection of a pruned block with given weights."""
    bias = projection.bias_of(value)
    return lambda inputs: functional.linear(inputs.index_select(-1, projection.columns), value.weight, bias)


def traced_forward(
    projection: Projection,
    *,
    weight: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
    observe: Observer | None = None,
) -> Forward:
    """The projection of a pruned block in a pass that has a backward pass.

    Args:
        weight: float32 [D, K] that receives its gradient; None for the projection's own, without one.
        gates: float32 [K / block], one factor a structure on the inputs, that receive their gradient.
        observe: takes in the kept inputs [B, S, K] and the gradient of the output [B, S, D].
    """
    value = projection.value()
    if not len(projection.columns):
        return plain_forward(projection, value)
    bias = projection.bias_of(value)
    rounded = value.weight if weight is None else weight.detach().to(value.weight.dtype)
    # The first block's input needs no gradient: this has autograd come by all the same.
    anchor = torch.zeros((), requires_grad=True)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Kept.apply(inputs, anchor, weight, gates, rounded, bias, projection, observe)
        return found

    return forward


class _Kept(torch.autograd.Function):
    """``linear(gates * inputs[..., columns], weight, bias)``; no gradient is formed that nothing asks for."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        anchor: torch.Tensor,
        weight: torch.Tensor | None,
        gates: torch.Tensor | None,
        rounded: torch.Tensor,
        bias: torch.Tensor | None,
        projection: Projection,
        observe: Observer | None,
    ) -> torch.Tensor:
        kept = inputs.index_select(-1, projection.columns)
        ctx.save_for_backward(kept, gates, rounded)
        ctx.projection, ctx.observe = projection, observe
        return functional.linear(_gated(kept, gates, projection.block), rounded, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        kept, gates, rounded = ctx.saved_tensors
        projection: Projection = ctx.projection
        wants_inputs, _, wants_weight, wants_gates = ctx.needs_input_grad[:4]
        if ctx.observe is not None:
            ctx.observe(kept, gradient)
        weight_grad = gates_grad = inputs_grad = None
        if wants_weight:
            rows, columns = rounded.shape
            total = product_total(rows, columns, gradient.device)
            add_product(total, gradient.flatten(0, 1), _gated(kept, gates, projection.block).flatten(0, 1))
            weight_grad = total[:rows, :columns].contiguous()
        if wants_inputs or wants_gates:
            inner = gradient @ rounded
            if wants_gates:
                gates_grad = gate_grads(kept, inner, block=projection.block).sum(0)
            inner = _gated(inner, gates, projection.block)
            # A gather from one more column of zeros: a scatter would be slow where it must be deterministic.
            inputs_grad = functional.pad(inner, (0, 1)).index_select(-1, projection.places)
        return inputs_grad, None, weight_grad, gates_grad, None, None, None, None


def _gated(inputs: torch.Tensor, gates: torch.Tensor | None, block: int) -> torch.Tensor:
    """Inputs [..., K] times the factor of their structure, in their dtype."""
    if gates is None:
        return inputs
    return (inputs * gates.repeat_interleave(block)).to(inputs.dtype)


def _kl_div(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Divergence of log probabilities [t, V] from wanted ones, [t]."""
    return functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
