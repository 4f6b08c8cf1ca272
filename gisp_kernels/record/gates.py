"""One recorded Linear of a second-order score: gate gradients of every sequence, and what they predict of the loss.

See :mod:`gisp_kernels.ops.gate_grads`. For a projection by columns a gate's gradient is ``sum X * dX``, for one by rows
``sum dY * (Y - b)``: tensors of the pass itself, no weight gradient is formed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gisp_kernels.groups import Projection, StructureGroup
from gisp_kernels.ops.gate_grads import gate_grads, gate_sums, loss_change
from gisp_kernels.record.tap import LinearTap, Needs, current_backward


class GateTap(LinearTap):
    """Predicts from one Linear layer how the loss changes when a structure goes.

    Attributes:
        curvature: gives the factors ``c_b`` of the running pass, [B], or ``None`` for the number of its tokens.
        units: gives what sequences of the running pass are squared together, [B], or ``None`` where each is by itself.
    """

    curvature: Callable[[], torch.Tensor | None]
    units: Callable[[], torch.Tensor | None]

    @property
    def needs(self) -> Needs:
        columns = self._projection.axis == "column"
        return Needs(input=columns, output=not columns, grad_input=columns)

    def add(self, projection: Projection) -> None:
        """Score the layer for a projection.

        Raises:
            ValueError: it is scored for another one.
        """
        super().add(projection)
        if len(self._projections) > 1:
            raise ValueError(
                f"group {self.name!r}: another group scores this layer in other structures; second-order scores need a "
                "recorder for each"
            )

    def reset(self) -> None:
        """Zero the sums, at the present width."""
        weight = self.linear.weight
        self._shape = tuple(weight.shape)
        count = self._projection.width // self._projection.block
        # What :func:`gisp_kernels.ops.gate_grads.gate_sums` gives, over all passes.
        self.sums = torch.zeros(3, count, dtype=torch.float64, device=weight.device)
        # By backward pass: gate gradients [B, count] of its uses of the layer, summed, and its tokens.
        self._gates: dict[int | None, tuple[torch.Tensor, int]] = {}

    def close(self) -> None:
        """Drop what an interrupted backward pass left behind."""
        super().close()
        self._gates.clear()

    def score(self, projection: Projection, active: bool) -> torch.Tensor:
        """Predicted changes so far, float32 [count]."""
        if active:
            self.check_width()
        return loss_change(self.sums)

    def collect(
        self,
        grad_output: torch.Tensor,
        input: torch.Tensor | None,
        output: torch.Tensor | None,
        grad_input: torch.Tensor | None,
    ) -> None:
        """Take one use of the layer in the running backward pass."""
        self.check_width()
        self._seen()
        if self._projection.axis == "column":
            assert input is not None and grad_input is not None
            value, grad = input, grad_input
        else:
            assert output is not None
            value, grad = output, grad_output
            if self.linear.bias is not None:
                value = value.float() - self.linear.bias.detach().float()
        value, grad = _sequences(value), _sequences(grad)
        found = gate_grads(value, grad, block=self._projection.block, backend=self._backend)
        tokens = value.shape[0] * value.shape[1]
        earlier = self._gates.get(current_backward())
        if earlier is not None:
            if earlier[0].shape != found.shape:
                raise RuntimeError(
                    f"group {self.name!r}: one pass uses a layer with {earlier[0].shape[0]} and {found.shape[0]} "
                    "sequences: second-order scores need the same ones"
                )
            found = found + earlier[0]
        self._gates[current_backward()] = found, tokens

    def _flush(self, _: torch.Tensor) -> None:
        """Score one backward pass, once the last use of the layer in it has been seen."""
        pending = self._gates.pop(current_backward(), None)
        if pending is None:
            return
        grads, tokens = pending
        curvature, units = self.curvature(), self.units()
        if units is not None and (curvature is None or units.shape != grads.shape[:1]):
            raise RuntimeError(f"units need curvature and one number for each of {len(grads)} sequences")
        if curvature is None:
            curvature = grads.new_full(grads.shape[:1], float(tokens))
        elif units is None and curvature.shape != grads.shape[:1]:
            raise RuntimeError(
                f"curvature has shape {tuple(curvature.shape)}, but group {self.name!r} saw {len(grads)} sequences"
            )
        self.sums += gate_sums(grads, curvature.to(grads.device), units)

    def take_weight_grad(self, grad: torch.Tensor) -> None:
        """Hook of the weight: its gradient does not tell sequences apart.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"group {self.name!r}: second-order scores need the forward inside the recorder, this one ran before it"
        )

    @property
    def _projection(self) -> Projection:
        return self._projections[0]


def gate_projection(group: StructureGroup) -> Projection:
    """The projection a group's structures leave through, or the only one.

    Raises:
        ValueError: several projections, none by columns.
    """
    columns = [p for p in group.projections if p.axis == "column"]
    if not columns and len(group.projections) > 1:
        raise ValueError(f"group {group.name!r}: second-order scores need its output projection (axis 'column')")
    return columns[0] if columns else group.projections[0]


def _sequences(tensor: torch.Tensor) -> torch.Tensor:
    """[B, ..., n] as [B, S, n], [S, n] as one sequence."""
    if tensor.dim() < 3:
        return tensor.reshape(1, -1, tensor.shape[-1])
    return tensor.flatten(1, -2)
