"""Whether scores choose the structures that the truth chooses."""

from __future__ import annotations

import torch

from gisp_kernels.testing import Truth


def assert_same_selection(actual: torch.Tensor, truth: Truth, count: int, slack: float | None = None) -> None:
    """Fail unless the ``count`` lowest scores are those of the truth, ties within rounding aside.

    Args:
        slack: relative error of a score that may move it across the threshold; :attr:`Truth.step` by default.
    """
    if not 0 < count < actual.numel():
        raise ValueError(f"count must be between 1 and {actual.numel() - 1}, got {count}")
    chosen = torch.zeros(actual.numel(), dtype=torch.bool, device=actual.device)
    expected = chosen.clone()
    chosen[torch.sort(actual, stable=True).indices[:count]] = True
    order = torch.sort(truth.scores, stable=True)
    expected[order.indices[:count]] = True
    threshold = order.values[count - 1 : count + 1].mean()
    distance = (truth.scores - threshold).abs()
    margin = (truth.step if slack is None else slack) * truth.magnitude
    wrong = (chosen != expected) & (distance > margin)
    assert not wrong.any(), f"structures {wrong.nonzero().flatten().tolist()} are on the wrong side of the threshold"
