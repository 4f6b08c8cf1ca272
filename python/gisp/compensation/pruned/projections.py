"""Output projections of pruned blocks: their values and changes, and their forward with the gradients asked for.

A projection reads the kept columns alone, which its block makes (:mod:`gisp.compensation.pruned.blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from gisp.compensation.pruned.blocks import Block, attention_block, mlp_block, shown
from gisp.errors import GispError
from gisp.model.structures import LayerMap, ModelMap
from gisp_kernels import gate_grads
from gisp_kernels.ops.products import add_product, product_total

Observer = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes in kept inputs [T, K] and gradients of the output [T, D]."""
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


class Traced(NamedTuple):
    """What a backward pass finds at a projection.

    Attributes:
        weight: float32 [D, K] that receives its gradient; None for the projection's own, without one.
        gates: float32 [K / block], one factor a structure on the inputs, that receive their gradient.
        observing: entered while the projection's layer is passed backward; gives what takes in every batch's tokens.
    """

    weight: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    observing: Callable[[], AbstractContextManager[Observer]] | None = None


@dataclass
class Projection:
    """An output projection of a pruned block.

    Attributes:
        name: of the block's group.
        layer: number of its layer.
        columns: original input columns that stay, int64 [K], on the device that computes.
        block: columns of one structure.
        computed: how the block computes what it reads.
        weight: of the kept columns, float32 [D, K], where the layer's weights lie; the model computes with it rounded
            to its dtype.
        bias: float32 [D], None for that of the dense model.
        reweighted: whether a method has changed the weight.
        factors: float32 [K / block], where the weight is that of the dense model times one factor a structure.
    """

    name: str
    layer: int
    linear: nn.Linear
    columns: torch.Tensor
    block: int
    computed: Block
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    reweighted: bool = False
    factors: torch.Tensor | None = None

    @classmethod
    def of(cls, model_map: ModelMap, item: LayerMap, name: str, columns: torch.Tensor, device: torch.device) -> Any:
        """The projection of a group that keeps these columns, ``None`` where it keeps all.

        Args:
            device: computes.
        """
        linear, block = model_map.outputs[name]
        if len(columns) == linear.in_features:
            return None
        weight = linear.weight.detach()[:, columns.to(linear.weight.device)].to(torch.float32, copy=True)
        make = attention_block if name == item.heads.name else mlp_block
        return cls(name, item.index, linear, columns.to(device), block, make(model_map, item, columns, device), weight)

    @property
    def changed(self) -> bool:
        """Whether a method has changed it."""
        return self.reweighted or self.bias is not None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.columns.device

    def value(self, move: Move | None = None, size: float = 1.0) -> Value:
        """What it computes with, after a move of some size."""
        weight, bias = self.weight.to(self.device), self.bias
        if move is not None and move.weight is not None:
            weight = torch.add(weight, move.weight.to(self.device), alpha=size)
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

    def plain(self, value: Value) -> Forward:
        """Its forward with given weights."""
        bias, gathered = self.bias_of(value), self.computed.gathered
        return lambda inputs: functional.linear(_kept(inputs, gathered), value.weight, bias)

    def traced(self, traced: Traced, observe: Observer | None) -> Forward:
        """Its forward in a pass that has a backward pass.

        Args:
            observe: takes in the kept inputs [B, S, K] and the gradient of the output [B, S, D].
        """
        value = self.value()
        if not len(self.columns):
            return self.plain(value)
        weight, gates = traced.weight, traced.gates
        bias = self.bias_of(value)
        rounded = value.weight if weight is None else weight.detach().to(value.weight.dtype)
        # The first block's input needs no gradient: this has autograd come by all the same.
        anchor = torch.zeros((), requires_grad=True)

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = _Kept.apply(inputs, anchor, weight, gates, rounded, bias, self, observe)
            return found

        return forward

    @contextmanager
    def showing(self, value: Value) -> Iterator[None]:
        """The modules of the block show the pruned one with a value, for the fused pass."""
        with ExitStack() as stack:
            stack.enter_context(self.computed.showing())
            stack.enter_context(shown(self.linear.weight, value.weight))
            if value.bias is not None and self.linear.bias is None:
                stack.callback(setattr, self.linear, "bias", None)
                self.linear.bias = nn.Parameter(value.bias, requires_grad=False)
            elif value.bias is not None:
                stack.enter_context(shown(self.linear.bias, value.bias))
            yield

    def _own_bias(self) -> torch.Tensor:
        own = self.linear.bias
        return self.weight.new_zeros(self.weight.shape[0]) if own is None else own.detach().float()


def _kept(inputs: torch.Tensor, gathered: torch.Tensor | None) -> torch.Tensor:
    return inputs if gathered is None else inputs.index_select(-1, gathered)


class _Kept(torch.autograd.Function):
    """``linear(gates * kept inputs, weight, bias)``; no gradient is formed that nothing asks for."""

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
        kept = _kept(inputs, projection.computed.gathered)
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
            inputs_grad = _gated(inner, gates, projection.block)
            places = projection.computed.places
            if places is not None:
                # A gather from one more column of zeros: a scatter would be slow where it must be deterministic.
                inputs_grad = functional.pad(inputs_grad, (0, 1)).index_select(-1, places)
        return inputs_grad, None, weight_grad, gates_grad, None, None, None, None


def _gated(inputs: torch.Tensor, gates: torch.Tensor | None, block: int) -> torch.Tensor:
    """Inputs [..., K] times the factor of their structure, in their dtype."""
    if gates is None:
        return inputs
    return (inputs * gates.repeat_interleave(block)).to(inputs.dtype)
