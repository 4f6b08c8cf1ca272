"""What the two blocks of a decoder layer have in common: a norm, projections that read it, and one that leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gisp.score.fused.batch import PassBatch
from gisp.score.fused.products import Products, parameter
from gisp_kernels import wgrad_importance
from gisp_kernels.groups import StructureGroup
from gisp_kernels.ops import decoder
from gisp_kernels.ops.gate_grads import write_gate_grads
from gisp_kernels.ops.importance import StackedLinear, stacked_wgrad_importance


@dataclass(frozen=True)
class Wanted:
    """What a block's backward pass leaves behind; one of the three.

    Attributes:
        elements: float32 [structures], ``sum |W * G|`` is added.
        gates: float32 [sequences, structures], overwritten by the gradients of gates on the structures.
        observe: is given what the leaving projection reads [T, columns] and the gradient of its output [T, D], which is
            overwritten afterwards.
    """

    elements: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    observe: Callable[[torch.Tensor, torch.Tensor], None] | None = None


@dataclass(frozen=True)
class Attended:
    """Attention of one forward.

    Attributes:
        output: [T, H * hd], before any gate.
        before: what turns its gradient [rows, H, length, hd] into those of queries, keys and values.
        inverse_rms: float32, of queries and of keys where these are normalised.
    """

    output: torch.Tensor
    before: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    inverse_rms: list[torch.Tensor]


@dataclass
class BlockState:
    """What a block keeps for its backward pass.

    Attributes:
        x: [T, D], input of the norm.
        rstd: float32 [T].
        read: [T, sum of O], outputs of the projections that read the norm, side by side.
        stack: weights of these projections, where they make one product.
        attended: of an attention block what its backward would else compute again; let go where memory is short.
    """

    x: torch.Tensor
    rstd: torch.Tensor
    read: torch.Tensor
    stack: torch.Tensor | None = None
    attended: Attended | None = None


class Block(ABC):
    """One block at whatever width it has when called.

    Args:
        group: its structures.
        norm: what the readers read.
        readers: projections that read the norm's output.
        leaver: the projection to the residual stream.
    """

    def __init__(
        self, group: StructureGroup, norm: Any, readers: list[nn.Linear], leaver: nn.Linear, products: Products
    ) -> None:
        self._name = group.name
        self._norm = norm
        self._readers = readers
        self._leaver = leaver
        self._products = products
        # Rows or columns of a structure in every projection that structures own a part of.
        self._widths = {projection.linear: projection.block for projection in group.projections}

    @property
    def empty(self) -> bool:
        """Whether no structure is left."""
        return parameter(self._readers[0], "weight").shape[0] == 0

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, batch: PassBatch
    ) -> tuple[BlockState, torch.Tensor | None]:
        """The block's contribution to the residual stream ``x + delta``.

        Returns:
            The state (its ``x`` is the sum) and the output [T, D], ``None`` for nothing.
        """
        weight, eps = parameter(self._norm, "weight"), self._norm.variance_epsilon
        x, normed, rstd = decoder.add_rms_norm(x, delta, weight, eps, total=delta, backend=batch.backend)
        if self.empty:
            bias = self._leaver.bias
            output = None if bias is None else bias.detach().expand_as(x).contiguous()
            return BlockState(x, rstd, normed.new_empty(x.shape[0], 0)), output
        stack = self._products.stacked(self._readers)
        state = BlockState(x, rstd, self._products.forward(normed, self._readers, stack), stack)
        return state, self._products.forward(self._through_gates(self._leaving(state, batch), batch), [self._leaver])

    @abstractmethod
    def _leaving(self, state: BlockState, batch: PassBatch) -> torch.Tensor:
        """What the leaving projection reads, [T, columns]; called once, it may write into the state."""

    @abstractmethod
    def backward(
        self, state: BlockState, grad: torch.Tensor, batch: PassBatch, wanted: Wanted | None, input_grad: bool
    ) -> None:
        """Backward of the block; ``grad`` [T, D] is dL/d(output) on entry and has dL/d(input) added on return.

        The state is used up.

        Args:
            wanted: where the block's scores go, ``None`` if it is not scored.
            input_grad: whether anything below needs ``grad``.
        """

    def _take_gates(
        self, gates: torch.Tensor, leaving: torch.Tensor, grad_leaving: torch.Tensor, batch: PassBatch
    ) -> None:
        """Gate gradients from what the leaving projection reads and its gradient, [T, columns] each."""
        operands = batch.by_sequence(leaving), batch.by_sequence(grad_leaving)
        write_gate_grads(gates, *operands, self._widths[self._leaver], batch.backend)

    def _through_gates(self, values: torch.Tensor, batch: PassBatch) -> torch.Tensor:
        """What passes the gates, forward or backward; [T, columns], changed in place."""
        gates = batch.gates.get(self._name)
        return values if gates is None else values.mul_(gates)

    def _score_leaver(self, elements: torch.Tensor, grad: torch.Tensor, leaving: torch.Tensor) -> None:
        """Add the scores of the leaving projection's elements."""
        width = self._widths[self._leaver]
        wgrad_importance(grad, leaving, self._leaver.weight, axis="column", block=width, out=elements)

    def _to_input(
        self,
        state: BlockState,
        grad: torch.Tensor,
        grad_read: torch.Tensor,
        elements: torch.Tensor | None,
        input_grad: bool,
        batch: PassBatch,
    ) -> None:
        """The end of a backward: scores of the readers' elements, and the gradient through readers and norm.

        Args:
            grad_read: gradient of ``state.read``.
        """
        norm = parameter(self._norm, "weight")
        if elements is not None:
            normed = decoder.rms_norm_apply(state.x, state.rstd, norm, backend=batch.backend)
            stack, start = [], 0
            for linear in self._readers:
                if linear in self._widths:
                    stack.append(StackedLinear(start, linear.weight, self._widths[linear], elements))
                start += linear.weight.shape[0]
            stacked_wgrad_importance(grad_read, normed, stack)
            del normed
        if input_grad:
            grad_normed = self._products.input_grad(grad_read, self._readers, state.stack)
            decoder.rms_norm_backward_(grad, grad_normed, state.x, state.rstd, norm, backend=batch.backend)
