"""What every recorded Linear shares: the autograd function in its forward, the hooks of its weight, its width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from gisp_kernels.groups import Projection
from gisp_kernels.ops.importance import as_tokens

Pending = TypeVar("Pending")


def current_backward() -> int | None:
    """Number of the backward pass this thread is running, or ``None``."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


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

    grad_output: torch.Tensor
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
        assert self.output is not None
        return self.output if bias is None else self.output.float() - bias.detach().float(), self.grad_output


class Tap(ABC, Generic[Pending]):
    """Collects the scores of one Linear layer, for every projection it is scored by.

    A subclass says what it reads of a use of the layer (:attr:`needs`) and what it makes of it (:meth:`_take_use`).
    What has to wait for the end of a backward pass goes to ``_pending``, by the number of the pass, and comes back
    through :meth:`_end_pass`.

    Args:
        name: group name, for messages.
        linear: the layer.
        backend: implementation of the ops.
        seen: called inside each backward pass that reaches the layer.

    Attributes:
        called: whether the layer ran since recording began.
    """

    def __init__(self, name: str, linear: nn.Linear, backend: str | None, seen: Callable[[], None]) -> None:
        self.name = name
        self.linear = linear
        self.called = False
        self._backend = backend
        self._seen = seen
        self._projections: list[Projection] = []
        self._shape: tuple[int, ...] = tuple(linear.weight.shape)
        self._pending: dict[int | None, list[Pending]] = {}
        self._kept_grad: list[torch.Tensor | None] = []
        self._anchor: torch.Tensor | None = None

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What a :class:`Use` is to hold."""

    @property
    def gates(self) -> torch.Tensor | None:
        """What the columns of the input are multiplied with, [I]; ``None`` for ones."""
        return None

    @abstractmethod
    def _zero(self) -> None:
        """Make the buffers anew, at the present width."""

    @abstractmethod
    def _scores_of(self, projection: Projection) -> torch.Tensor:
        """Scores so far, [count]."""

    @abstractmethod
    def _take_use(self, use: Use) -> None:
        """Score one use of the layer in the running backward pass, or keep it until the pass ends."""

    @abstractmethod
    def _take_weight_grad(self, grad: torch.Tensor) -> None:
        """Score a weight gradient, of a graph built before recording began."""

    def _end_pass(self, pending: list[Pending]) -> None:
        """Score what uses of the layer left in one backward pass, once the last of them has been seen."""

    def add(self, projection: Projection) -> None:
        """Score the layer for one more projection."""
        if projection not in self._projections:
            self._projections.append(projection)

    def reset(self) -> None:
        """Zero the scores, at the present width."""
        self._shape = tuple(self.linear.weight.shape)
        self._pending.clear()
        self._zero()

    def close(self) -> None:
        """Drop what an interrupted backward pass left behind."""
        self._pending.clear()
        self._anchor = None
        if self._kept_grad:
            self.linear.weight.grad = self._kept_grad.pop()
            self._kept_grad.clear()

    def check_width(self) -> None:
        """Require the shape the buffers were made for."""
        shape = tuple(self.linear.weight.shape)
        if shape != self._shape:
            raise RuntimeError(
                f"group {self.name!r}: a weight changed from {self._shape} to {shape} while being recorded; "
                "read the scores before changing widths and call reset() after"
            )

    def score(self, projection: Projection, active: bool) -> torch.Tensor:
        """Scores for one projection, [count]; while recording is ``active`` the width must be as it was."""
        if active:
            self.check_width()
        return self._scores_of(projection)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer, recorded if a graph is being built."""
        linear = self.linear
        self.check_width()
        inside = current_backward() is not None
        if not inside:
            self.called = True
            self._pending.clear()
        # Recomputation inside a backward pass must repeat what the original forward did. A layer not called
        # since recording began ran unrecorded, and the hooks of its weight score it.
        unrecorded = inside and not self.called and linear.weight.requires_grad
        if unrecorded or not torch.is_grad_enabled():
            gates = self.gates
            return F.linear(input if gates is None else input * gates.to(input.dtype), linear.weight, linear.bias)
        if self._anchor is None:
            # An empty tensor costs no kernel to accumulate, yet its hook runs once per backward pass, after the
            # last use of the layer in it.
            self._anchor = torch.zeros(0, device=linear.weight.device, requires_grad=True)
            self._anchor.register_hook(self._leave_pass)
        return _RecordedLinear.apply(input, linear.bias, self._anchor, linear.weight.detach(), self)

    def collect(self, use: Use) -> None:
        """Take one use of the layer in the running backward pass."""
        self.check_width()
        self._seen()
        self._take_use(use)

    def _leave_pass(self, _: torch.Tensor) -> None:
        pending = self._pending.pop(current_backward(), None)
        if pending is not None:
            self._end_pass(pending)

    def take_weight_grad(self, grad: torch.Tensor) -> None:
        """Hook of the weight: score its gradient, and put its ``.grad`` aside from the accumulation that follows."""
        self.check_width()
        self._seen()
        self._take_weight_grad(grad)
        weight = self.linear.weight
        self._kept_grad.append(weight.grad)
        weight.grad = None

    def restore_weight_grad(self, weight: torch.Tensor) -> None:
        """Hook of the weight after accumulation: its ``.grad`` as before."""
        weight.grad = self._kept_grad.pop()


class _RecordedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        bias: torch.Tensor | None,
        anchor: torch.Tensor,
        weight: torch.Tensor,
        tap: Tap[Any],
    ) -> torch.Tensor:
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
        if grad_output is None:
            return None, None, None, None, None
        input, weight, output, gates = ctx.saved_tensors
        grad_input = grad_bias = None
        with torch.autocast(weight.device.type, enabled=False):
            if ctx.needs_input_grad[0] or ctx.tap.needs.grad_input:
                grad_input = grad_output.matmul(weight.to(grad_output.dtype))
            if ctx.needs_input_grad[1]:
                grad_bias = as_tokens(grad_output).sum(0)
            ctx.tap.collect(Use(grad_output, input, output, grad_input))
            # The tap has seen the gradient at the gates; on goes what passes through them.
            if grad_input is not None and gates is not None:
                grad_input = grad_input * gates.to(grad_input.dtype)
        grad_input = None if grad_input is None else grad_input.to(ctx.input_dtype)
        return grad_input, grad_bias, weight.new_zeros(0, dtype=torch.float32), None, None
