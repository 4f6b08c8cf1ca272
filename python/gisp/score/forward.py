"""A forward pass over the sequences of a step: its loss, and what a recorder sees on the way."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Protocol

import torch

from gisp.data.batches import StepBatches
from gisp.model.modes import deterministic, evaluation_mode
from gisp.model.structures import ModelMap
from gisp.score.objectives import sequence_nll
from gisp_kernels.groups import Projection, StructureGroup


class MaskedRecorder(Protocol):
    """A context manager that counts the tokens its ``mask`` allows; bool [B, S]."""

    mask: torch.Tensor | None

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


def forward_pass(
    model_map: ModelMap, steps: StepBatches, step: int, recorder: MaskedRecorder | None = None
) -> tuple[torch.Tensor, int]:
    """Pass the sequences of ``step`` through the model without gradients.

    Args:
        recorder: entered for the passes; its mask leaves out padding, and nothing else.

    Returns:
        The loss of the sequences, 0-dim float64 on the device, and the tokens passed.
    """
    data, numbers = steps.data, steps.numbers(step)
    weights = steps.weights(step)
    device = next(model_map.model.parameters()).device
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    active: contextlib.AbstractContextManager[object] = recorder or contextlib.nullcontext()
    with deterministic(), evaluation_mode(model_map.model), torch.no_grad(), active:
        for start, stop in steps.batches(numbers):
            ids, labels = data.batch(numbers[start:stop])
            if recorder is not None:
                lengths = torch.tensor([len(data.rows[i][0]) for i in numbers[start:stop]])
                recorder.mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)
            nll = sequence_nll(model_map.model, ids.to(device), labels.to(device))
            total += (nll * torch.tensor(weights[start:stop], device=device)).sum()
            tokens += ids.numel()
    return total, tokens


def output_projection(group: StructureGroup) -> Projection:
    """The projection a group's structures leave through (``o_proj``, ``down_proj``): one or more columns each."""
    return next(p for p in group.projections if p.axis == "column")


def by_structure(columns: torch.Tensor, group: StructureGroup) -> torch.Tensor:
    """Values of an output projection's columns as [structures, columns of each]."""
    return columns.view(group.count, output_projection(group).block)
