"""One recorded Linear: the autograd function that scores its weight gradient, and where the scores go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from gisp_kernels.groups import Projection
from gisp_kernels.ops.importance import abs_weighted_reduce, as_tokens, wgrad_importance
from gisp_kernels.ops.products import add_product, product_total


def current_backward() -> int | None:
    """Number of the backward pass this thread is running, or ``None``."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


class Needs(NamedTuple):
    """Which tensors of a use of the layer its backward pass reads beside the gradient of the output."""

    input: bool
    output: bool
    grad_input: bool


class LinearTap:
    """Collects scores (or, when ``exact``, the summed weight gradient) of one Linear layer.

    Args:
        name: group name, for messages.
        linear: the layer.
        exact: keep the float32 sum of weight gradients and score it on demand.
        backend: implementation of the ops.
        seen: called inside each backward pass that reaches the layer.
    """

    def __init__(
        self, name: str, linear: nn.Linear, *, exact: bool, backend: str | None, seen: Callable[[], None]
    ) -> None:
        self.name = name
        self.linear = linear
        self.called = False
        self._exact = exact
        self._backend = backend
        self._seen = seen
        self._projections: list[Projection] = []
        self._scores: list[torch.Tensor] = []
        self._grad: torch.Tensor | None = None
        self._padded_grad: torch.Tensor | None = None
        self._shape: tuple[int, ...] = tuple(linear.weight.shape)
        self._pending: dict[int | None, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._kept_grad: list[torch.Tensor | None] = []
        self._anchor: torch.Tensor | None = None

    def add(self, projection: Projection) -> None:
        """Score the layer for one more projection."""
        if projection not in self._projections:
            self._projections.append(projection)

    def reset(self) -> None:
        """Zero the buffers, at the present width."""
        weight = self.linear.weight
        self._shape = tuple(weight.shape)
        self._pending.clear()
        if self._exact:
            rows, width = self._shape
            self._padded_grad = product_total(rows, width, weight.device)
            self._grad = self._padded_grad[:rows, :width]
        else:
            counts = [p.width // p.block for p in self._projections]
            self._scores = [torch.zeros(n, dtype=torch.float32, device=weight.device) for n in counts]

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
        """Scores for one projection, float32 [count]."""
        if active or self._exact:
            self.check_width()
        if self._grad is None:
            return self._scores[self._projections.index(projection)]
        return abs_weighted_reduce(
            self.linear.weight,
            self._grad,
            axis=projection.axis,
            block=projection.block,
            backend=self._backend,
        )

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
            return F.linear(input, linear.weight, linear.bias)
        if self._anchor is None:
            # An empty tensor costs no kernel to accumulate, yet its hook runs once per backward pass, after the
            # last use of the layer in it.
            self._anchor = torch.zeros(0, device=linear.weight.device, requires_grad=True)
            self._anchor.register_hook(self._flush)
        return _RecordedLinear.apply(input, linear.bias, self._anchor, linear.weight.detach(), self)

    @property
    def needs(self) -> Needs:
        """What :meth:`collect` is to be given."""
        return Needs(input=True, output=False, grad_input=False)

    def collect(
        self,
        grad_output: torch.Tensor,
        input: torch.Tensor | None,
        output: torch.Tensor | None,
        grad_input: torch.Tensor | None,
    ) -> None:
        """Take one use of the layer in the running backward pass: [..., O], [..., I], [..., O] and [..., I]."""
        self.check_width()
        self._seen()
        assert input is not None
        grad_output, input = as_tokens(grad_output), as_tokens(input)
        if self._padded_grad is not None:
            add_product(self._padded_grad, grad_output, input)
        else:
            self._pending.setdefault(current_backward(), []).append((grad_output, input))

    def _flush(self, _: torch.Tensor) -> None:
        """Score all uses of one backward pass: their tokens side by side give the summed gradient."""
        uses = self._pending.pop(current_backward(), [])
        if not uses:
            return
        grad_output, input = uses[0]
        if len(uses) > 1:
            grad_output = torch.cat([use[0] for use in uses])
            input = torch.cat([use[1] for use in uses])
        weight = self.linear.weight
        with torch.autocast(weight.device.type, enabled=False):
            for projection, out in zip(self._projections, self._scores, strict=True):
                wgrad_importance(
                    grad_output,
                    input,
                    weight,
                    axis=projection.axis,
                    block=projection.block,
                    out=out,
                    backend=self._backend,
                )

    def take_weight_grad(self, grad: torch.Tensor) -> None:
        """Hook of the weight: score its gradient, and put its ``.grad`` aside from the accumulation that follows."""
        self.check_width()
        self._seen()
        weight = self.linear.weight
        if self._grad is not None:
            self._grad.add_(grad)
        else:
            for projection, out in zip(self._projections, self._scores, strict=True):
                abs_weighted_reduce(
                    weight,
                    grad,
                    axis=projection.axis,
                    block=projection.block,
                    out=out,
                    backend=self._backend,
                )
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
        tap: LinearTap,
    ) -> torch.Tensor:
        ctx.tap = tap
        ctx.input_dtype = input.dtype
        ctx.set_materialize_grads(False)
        kind = input.device.type
        if torch.is_autocast_enabled(kind) and input.dtype in (torch.float32, torch.float16, torch.bfloat16):
            # Autocast would make this copy for the product; the backward pass needs the same one.
            input = input.to(torch.get_autocast_dtype(kind))
        output = F.linear(input, weight, bias)
        needs = tap.needs
        ctx.save_for_backward(input if needs.input else None, weight, output if needs.output else None)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None
        input, weight, output = ctx.saved_tensors
        grad_input = grad_bias = None
        with torch.autocast(weight.device.type, enabled=False):
            if ctx.needs_input_grad[0] or ctx.tap.needs.grad_input:
                grad_input = grad_output.matmul(weight.to(grad_output.dtype))
            if ctx.needs_input_grad[1]:
                grad_bias = as_tokens(grad_output).sum(0)
            ctx.tap.collect(grad_output, input, output, grad_input)
        grad_input = None if grad_input is None else grad_input.to(ctx.input_dtype)
        return grad_input, grad_bias, weight.new_zeros(0, dtype=torch.float32), None, None
