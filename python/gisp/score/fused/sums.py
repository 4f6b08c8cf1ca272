"""Gate gradients of micro-batches: parts by group, sums over samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gisp.score.fused.batch import MicroBatch, PassBatch
from gisp_kernels import gate_sums


def sample_sums(gates: torch.Tensor, batch: PassBatch, micro: MicroBatch) -> torch.Tensor:
    """Sums over the samples of a micro-batch, float64 [3, structures], of gate gradients [rows, structures]."""
    if micro.samples is None:
        return gate_sums(gates, batch.curvature)
    return gate_sums(gates, micro.samples.curvature.to(gates.device), micro.samples.index)


def parts_by_group(scored: Sequence[tuple[str, int]], buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views by group of a buffer [..., structures].

    Args:
        scored: name and present count of every group.
    """
    if not scored:
        return {}
    sizes = [count for _, count in scored]
    return dict(zip((name for name, _ in scored), buffer.split(sizes, dim=-1), strict=True))
