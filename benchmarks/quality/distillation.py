"""A loss of the user's own for the study: divergence from the dense model's predictions, or a mixture with the NLL."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from gisp.data.sequences import IGNORED
from gisp.score.objectives import sequence_nll


class Distillation:
    """``share * KL(dense || pruned) + (1 - share) * NLL`` of every sequence, means over its scored tokens.

    At the dense model the divergence and its gradient vanish: a share of 1 says nothing about the first step.

    Args:
        dense: the dense model, another one than the model that is pruned.
    """

    def __init__(self, dense: Any, share: float) -> None:
        self.dense = dense
        self.share = share

    def __call__(self, model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each sequence, fp32 [B]."""
        with torch.no_grad():
            wanted = self.dense(input_ids=input_ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        found = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        scored = labels[:, 1:] != IGNORED
        apart = functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        divergence = (apart * scored).sum(1) / scored.sum(1)
        if self.share == 1:
            return divergence
        return self.share * divergence + (1 - self.share) * sequence_nll(model, input_ids, labels)
