"""One use of a recorded Linear: the autograd function in its forward, and what its backward hands to a tap."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gisp_kernels.groups import Projection
from gisp_kernels.ops.importance import as_tokens


def current_backward() -> int | None:
    """Number of the backward pass this thread is running, or ``None``."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast on a device; leaving one that is on takes time, where none is on nothing is done."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class Needs(NamedTuple):
    """Which tensors of a use of the layer its tap reads beside the gradient of the output."""

    input: bool
    output: bool
    grad_input: bool

    @classmethod
    def of_gates(cls, projections: Iterable[Projection]) -> Needs:
        """What :meth:`Use.at_gates` reads."""
        axes = {projection.axis for projection in projections}
        return cls(input="column" in axes, output="row" in axes, grad_input="column" in axes)


class Use(NamedTuple):
    """One use of the layer in a backward pass; ``None`` for what its tap does not need.

    Attributes:
        grad_output, output: [..., O].
        input, grad_input: [..., I].
    """

    grad_output: torch.Tensor | None
    input: torch.Tensor | None
    output: torch.Tensor | None
    grad_input: torch.Tensor | None

    def at_gates(self, axis: str, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Values that gates on columns or rows multiply, and their gradients.

        The sum over tokens of their product is the gradient of gates that stand at 1.
        """
        if axis == "column":
            assert self.input is not None and self.grad_input is not None
            return self.input, self.grad_input
        assert self.output is not None and self.grad_output is not None
        return self.output if bias is None else self.output.float() - bias.detach().float(), self.grad_output


class RecordedLinear(torch.autograd.Function):
    """A Linear whose backward gives its tap a :class:`Use` in place of forming a weight gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        anchor: torch.Tensor,
        bias: torch.Tensor | None,
        weight: torch.Tensor,
        tap: Any,
    ) -> torch.Tensor:
        """``input * gates @ weight.T + bias``, [..., O].

        Args:
            input: [..., I].
            anchor: empty, requires a gradient. It stands for the weight in the graph: a pass that reaches it is scored,
                and the weight gets no gradient.
            bias: [O] or ``None``.
            weight: [O, I].
            tap: the :class:`gisp_kernels.record.attach.tap.Tap` of the layer.
        """
        ctx.tap = tap
        ctx.input_dtype = input.dtype
        ctx.set_materialize_grads(False)
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype in (torch.float32, torch.float16, torch.bfloat16):
            # Autocast would make this copy for the product; the backward pass needs the same one.
            input = input.to(torch.get_autocast_dtype(device))
        gates = tap.gates
        output = F.linear(input if gates is None else input * gates.to(input.dtype), weight, bias)
        needs = tap.needs
        ctx.save_for_backward(input if needs.input else None, weight, output if needs.output else None, gates)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of ``input`` and ``bias`` for dL/d(output) [..., O]; the tap collects the :class:`Use`."""
        if grad_output is None:
            return None, None, None, None, None
        # A pass towards other tensors alone (torch.autograd.grad) gives weights no gradient, and scores nothing.
        scored = torch._C._will_engine_execute_node(ctx.next_functions[1][0])
        input, weight, output, gates = ctx.saved_tensors
        grad_input = grad_bias = None
        with without_autocast(weight.device):
            if ctx.needs_input_grad[0] or (scored and ctx.tap.needs.grad_input):
                grad_input = grad_output.matmul(weight.to(grad_output.dtype))
            if ctx.needs_input_grad[2]:
                grad_bias = as_tokens(grad_output).sum(0)
            if scored:
                ctx.tap.collect(Use(grad_output, input, output, grad_input))
            # The tap has seen the gradient at the gates; on goes what passes through them.
            if grad_input is not None and gates is not None:
                grad_input = grad_input * gates.to(grad_input.dtype)
        grad_input = None if grad_input is None else grad_input.to(ctx.input_dtype)
        return grad_input, None, grad_bias, None, None
