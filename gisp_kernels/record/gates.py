"""One recorded Linear of a second-order score: gate gradients of every sequence, and what they predict of the loss.

See :mod:`gisp_kernels.ops.gate_grads`. For a projection by columns a gate's gradient is ``sum X * dX``, for one by rows
``sum dY * (Y - b)``: tensors of the pass itself, no weight gradient is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gisp_kernels import checks
from gisp_kernels.groups import Projection, StructureGroup
from gisp_kernels.ops.gate_grads import gate_grads, gate_sums, loss_change
from gisp_kernels.record.attach.tap import Tap
from gisp_kernels.record.attach.use import Needs, Use, current_backward
from gisp_kernels.record.sums import own_lines


class GateTap(Tap[tuple[torch.Tensor, int]]):
    """Predicts from one Linear layer how the loss changes when a structure goes.

    Args:
        factors: gives of the running pass ``c_b`` [B], or ``None`` for the number of its tokens, and of which
            sample each sequence is [B], or ``None`` where each is one by itself (:func:`gisp_kernels.gate_sums`).

    Attributes:
        sums: float64 [3, count], what :func:`gisp_kernels.gate_sums` gives, over all passes.
    """

    def __init__(self, *args: Any, factors: Callable[[], tuple[torch.Tensor | None, torch.Tensor | None]]) -> None:
        super().__init__(*args)
        self._factors = factors
        self._gates: torch.Tensor | None = None

    @property
    def gates(self) -> torch.Tensor | None:
        """As of :class:`Tap`."""
        return self._gates

    def close_gates(self, closed: torch.Tensor) -> None:
        """Have gates stand at 0 where ``closed``, bool [count], says so.

        Raises:
            ValueError: the layer is scored by rows, or has another number of structures.
        """
        (projection,) = self._projections
        count = int(projection.count)
        if projection.axis != "column":
            raise ValueError(f"group {self.name!r}: only structures with an output projection can be closed")
        if closed.dtype != torch.bool or closed.shape != (count,):
            raise ValueError(
                f"closed of group {self.name!r} must be bool [{count}], got {closed.dtype} {list(closed.shape)}"
            )
        self._gates = _columns(projection, closed, self.linear.weight.dtype)

    @property
    def needs(self) -> Needs:
        return Needs.of_gates(self._projections)

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

    def _zero(self) -> None:
        (projection,) = self._projections
        count = int(projection.count)
        self.sums = torch.zeros(3, count, dtype=torch.float64, device=self.linear.weight.device)

    def _totals(self) -> list[torch.Tensor]:
        return [self.sums]

    def _scores_of(self, projection: Projection, totals: list[torch.Tensor]) -> torch.Tensor:
        return loss_change(totals[0])

    def _take_use(self, use: Use) -> None:
        (projection,) = self._projections
        at_gates = use.at_gates(projection.axis, self.linear.bias)
        (value, block), (grad, _) = (own_lines(_sequences(tensor), projection) for tensor in at_gates)
        found = gate_grads(value, grad, block=block, backend=self._backend)
        # Uses of one pass are summed as they come.
        earlier = self._pending.get(current_backward())
        if earlier is not None:
            if earlier[0][0].shape != found.shape:
                raise RuntimeError(
                    f"group {self.name!r}: one pass uses a layer with {len(earlier[0][0])} and {len(found)} "
                    "sequences: second-order scores need the same ones"
                )
            found = found + earlier[0][0]
        self._pending[current_backward()] = [(found, value.shape[0] * value.shape[1])]

    def _end_pass(self, pending: list[tuple[torch.Tensor, int]]) -> None:
        ((grads, tokens),) = pending
        curvature, samples = self._factors()
        for name, given in (("curvature", curvature), ("samples", samples)):
            if given is not None:
                checks.check_tensor(name, given)
        if samples is not None and (curvature is None or samples.shape != grads.shape[:1]):
            raise RuntimeError(f"samples need curvature and one number for each of {len(grads)} sequences")
        if curvature is None:
            curvature = grads.new_full(grads.shape[:1], float(tokens))
        elif samples is None and curvature.shape != grads.shape[:1]:
            raise RuntimeError(
                f"curvature has shape {tuple(curvature.shape)}, but group {self.name!r} saw {len(grads)} sequences"
            )
        self.sums += gate_sums(grads, curvature.to(grads.device), samples)

    def _take_weight_grad(self, weight: torch.Tensor, grad: torch.Tensor) -> None:
        """Refuse a weight gradient, which does not tell sequences apart."""
        raise RuntimeError(
            f"group {self.name!r}: second-order scores need the forward inside the recorder, this one ran before it"
        )


def gate_projection(group: StructureGroup) -> Projection:
    """The projection a group's structures leave through, or the only one.

    Raises:
        ValueError: several projections, none by columns.
    """
    columns = [p for p in group.projections if p.axis == "column"]
    if not columns and len(group.projections) > 1:
        raise ValueError(f"group {group.name!r}: second-order scores need its output projection (axis 'column')")
    return columns[0] if columns else group.projections[0]


def gate_columns(group: StructureGroup, closed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What gates multiply the columns of a group's output projection with: 0 where ``closed``, bool [count], else 1."""
    return _columns(gate_projection(group), closed, dtype)


def _columns(projection: Projection, closed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    device = projection.linear.weight.device
    if projection.index is None:
        return (~closed).to(device, dtype).repeat_interleave(projection.block)
    columns = torch.ones(projection.width, device=device, dtype=dtype)
    columns[projection.index.to(device)[closed.to(device)]] = 0
    return columns


def _sequences(tensor: torch.Tensor) -> torch.Tensor:
    """[B, ..., n] as [B, S, n], [S, n] as one sequence."""
    if tensor.dim() < 3:
        return tensor.reshape(1, -1, tensor.shape[-1])
    return tensor.flatten(1, -2)
