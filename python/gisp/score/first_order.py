"""How far the first-order term of second-order scores is to be believed.

The gradient of a gate is the mean of noisy gradients of sequences. Taken as it is, the structures that go first are
those whose noise happens to promise most. The best linear estimate of the true gradient is the measured one times
``signal / (signal + noise)``, its variances over the structures (James and Stein, 1961): near the optimum of the model
all is noise and the curvature alone decides; as pruning moves the model away, the gradient counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from gisp_kernels.groups import GroupKind


def averaged_batches(ema: float, step: int) -> float:
    """Batches of equal noise whose plain mean is as noisy as the moving average of scores at a step (1-based).

    Args:
        ema: weight of the past; the average's start from zero is divided out.
    """
    weights = (1 - ema**step) / (1 - ema)
    squares = (1 - ema ** (2 * step)) / (1 - ema**2)
    return weights**2 / squares


def shrinkage(sums: Iterable[torch.Tensor], sequences: int, batches: float) -> torch.Tensor:
    """Factor of the first-order term, 0-dim float64 in [0, 1].

    Args:
        sums: of structures of one kind, float64 [3, count] each (:func:`gisp_kernels.gate_sums`), over one batch.
        sequences: in that batch, at least 2.
        batches: independent batches whose mean the term is a part of.
    """
    together = torch.cat([*sums], dim=1)
    first, squares = together[0].square(), together[2]
    known = squares > 0
    # (sum g)^2 over sum g^2 is 1 on average where all is noise, and the number of sequences where all agree. With true
    # gradients of ``signal`` times the variance of a batch's noise it is (1 + signal) / (1 + signal / sequences).
    ratio = torch.where(known, first / torch.where(known, squares, 1), 1).mean()
    signal = (ratio - 1).clamp_min(0) / (1 - ratio / sequences).clamp_min(1e-12)
    return signal / (signal + 1 / batches)


def first_order_weights(
    sums: Mapping[str, torch.Tensor], kinds: Mapping[str, GroupKind | None], sequences: int, batches: float
) -> dict[str, torch.Tensor]:
    """:func:`shrinkage` for every group, from all groups of its kind.

    Args:
        kinds: of every group.
    """
    by_kind: dict[GroupKind | None, list[torch.Tensor]] = {}
    for name, values in sums.items():
        by_kind.setdefault(kinds[name], []).append(values)
    factors = {kind: shrinkage(values, sequences, batches) for kind, values in by_kind.items()}
    return {name: factors[kinds[name]] for name in sums}
