"""Milestones: steps of a run whose compensations a nested checkpoint carries, fitted and brought into its order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from gisp.compensation import Compensation, CompensationRequest, fit_compensation
from gisp.compensation.apply import calibration_sequences
from gisp.export.nested.order import Nesting, milestone_name, output_projections, stored_name
from gisp.model.keep import block_columns
from gisp.model.structures import map_model
from gisp.progress import track
from gisp.run.trajectory import Trajectory
from gisp_kernels.groups import KINDS


@dataclass(frozen=True)
class Milestone:
    """A step of a run and its compensation.

    Attributes:
        compensation: its tensors are on the CPU.
        text: what was done and accepted, in one line.
    """

    step: int
    compensation: Compensation
    text: str

    def bytes(self, dtype: torch.dtype) -> int:
        """What it stores in a checkpoint of that dtype."""
        total = 0
        for update in self.compensation.updates:
            kept = [tensor for tensor in (update.weight, update.bias) if tensor is not None]
            total += sum(tensor.numel() for tensor in kept) * dtype.itemsize
            total += 0 if update.factors is None else update.factors.numel() * update.factors.element_size()
        return total


def fit_milestones(
    trajectory: Trajectory, steps: Sequence[int], request: CompensationRequest, device: str
) -> list[Milestone]:
    """Compensations of some steps, each fitted in the dtype of the run as for an export of that size.

    Memory: what fitting one takes, and the changed weights of all on the CPU.

    Raises:
        GispError: another base model, unreadable data, or activations that are not finite.
    """
    model_map = map_model(trajectory.load_base(device=device))
    source = str(trajectory.base_model["path"])
    options = request.for_format("nested", model_map, adds_biases=True)
    data = calibration_sequences(model_map, request.calibration, source)
    found = []
    for step in track(steps, "compensating sizes"):
        done = fit_compensation(model_map, trajectory.keep(step), data, options, tokenizer_from=source)
        found.append(Milestone(step, _on_cpu(done), request.describe(done)))
    return found


def _on_cpu(done: Compensation) -> Compensation:
    updates = []
    for update in done.updates:
        weight, bias, factors = (
            None if tensor is None else tensor.cpu() for tensor in (update.weight, update.bias, update.factors)
        )
        # Factors say what the weight is.
        weight = None if factors is not None else weight
        updates.append(replace(update, columns=update.columns.cpu(), weight=weight, bias=bias, factors=factors))
    return replace(done, updates=tuple(updates))


def milestone_tensors(
    milestone: Milestone, nesting: Nesting, head_dim: int, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stored names and tensors of a milestone, one at a time.

    Args:
        dtype: of the checkpoint's weights.
    """
    step = milestone.step
    updates = {update.name: update for update in milestone.compensation.updates}
    for layer, owner, item in output_projections(len(nesting.layers)):
        update = updates.get(f"layers.{layer}.{item.kind}")
        if update is None:
            continue
        count, block = int(nesting.prefixes[step, layer, KINDS.index(item.kind)]), item.block(head_dim)
        order = getattr(nesting.layers[layer], item.kind)[:count]
        # Columns of an update stand in original order.
        if update.factors is not None:
            yield milestone_name(step, f"{owner}.factors"), update.factors[order.argsort().argsort()]
        elif update.weight is not None and count:
            position = torch.searchsorted(update.columns, block_columns(order, block))
            yield milestone_name(step, stored_name(f"{owner}.weight", item)), update.weight.t()[position].to(dtype)
        if update.bias is not None:
            yield milestone_name(step, f"{owner}.bias"), update.bias.to(dtype)
