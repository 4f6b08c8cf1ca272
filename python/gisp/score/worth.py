"""What every structure is worth to the model as it is: those present by their going, those gone by their coming back.

The dense model runs with the gates of removed structures at 0. The gradient of a gate at 0, ``sum X * dX`` over tokens
and the structure's columns, says how the loss changes as the structure comes back. It counts to first order alone: the
curvature that squared gradients stand for is that of a whole step from 0 to 1 and outweighs every gain
(benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gisp.score.first_order import shrinkage
from gisp.score.gradient import GradientScorer
from gisp_kernels import loss_change
from gisp_kernels.groups import StructureGroup


@dataclass(frozen=True)
class Worth:
    """Worth of all structures.

    Attributes:
        values: group name -> fp32 [count], predicted rise of the loss without the structure; negative: it does harm.
        loss: of the model as it is, 0-dim float64 on the device.
        tokens: tokens passed.
    """

    values: dict[str, torch.Tensor]
    loss: torch.Tensor
    tokens: int


def structure_worth(
    scorer: GradientScorer, steps: range, groups: list[StructureGroup], closed: Mapping[str, torch.Tensor]
) -> Worth:
    """Worth on the batches of several steps.

    Args:
        steps: numbers of the batches (1-based).
        groups: those scored, of the dense model.
        closed: group name -> bool [count] on the model's device, structures that are gone.
    """
    sums: dict[str, torch.Tensor] = {}
    loss, tokens, samples = torch.zeros((), dtype=torch.float64, device=next(iter(closed.values())).device), 0, 0
    # Means over the batches; sums of plain squares fall with their number once more.
    factors = torch.tensor([1, 1, 1 / len(steps)], dtype=torch.float64, device=loss.device)[:, None] / len(steps)
    for step in steps:
        found, part, passed, drawn = scorer.gate_sums(step, groups, closed)
        for name, new in found.items():
            sums[name] = sums.get(name, 0) + new * factors
        loss += part / len(steps)
        tokens += passed
        samples += drawn
    values = {name: torch.empty(total.shape[1], device=loss.device) for name, total in sums.items()}
    for kind in sorted({group.kind or "" for group in groups}):
        for gone in (False, True):
            _fill(values, sums, closed, [g.name for g in groups if (g.kind or "") == kind], gone, samples)
    return Worth(values, loss, tokens)


def _fill(
    values: dict[str, torch.Tensor],
    sums: Mapping[str, torch.Tensor],
    closed: Mapping[str, torch.Tensor],
    names: list[str],
    gone: bool,
    samples: int,
) -> None:
    """The worth of one kind of structures, those present or those gone, from the sums over all sequences."""
    chosen = {name: closed[name] == gone for name in names}
    parts = [sums[name][:, chosen[name]] for name in names]
    known = samples > 1 and any(part.numel() for part in parts)
    trust = shrinkage(parts, samples, 1.0) if known else 1.0
    for name, part in zip(names, parts, strict=True):
        if gone:
            part = part * torch.tensor([1.0, 0.0, 0.0], dtype=part.dtype, device=part.device)[:, None]
        values[name][chosen[name]] = loss_change(part, trust)
