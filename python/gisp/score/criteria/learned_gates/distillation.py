"""What gates are trained on: NLL and the divergence from the dense model, with their gradient by the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gisp.data.sequences import IGNORED

# Elements of float32 logits alive at a time, of each of the two models.
CHUNK_ELEMENTS = 2**25


class Distilled(NamedTuple):
    """Losses of one pass and the gradient of what is trained on.

    Attributes:
        dense_nll: weighted mean NLL of the dense model, 0-dim float64 in nats.
        nll: that of the gated model.
        divergence: weighted mean KL of the gated from the dense model.
        grad: gradient of ``nll + factor * divergence`` by the gated model's logits, in their dtype and shape.
    """

    dense_nll: torch.Tensor
    nll: torch.Tensor
    divergence: torch.Tensor
    grad: torch.Tensor


def distilled(
    logits: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, factor: float
) -> Distilled:
    """Losses over the scored tokens; the loss of a sequence is the mean over its own.

    In chunks of tokens: beside the gradient no tensor of the size of the logits is made.

    Args:
        logits, dense: [B, S, V], of the gated and of the dense model.
        labels: int64 [B, S]; token ``t`` is predicted from tokens before it, -100 is not scored.
        weights: [B], weight of each sequence.
        factor: of the divergence.
    """
    scored = labels[:, 1:] != IGNORED
    rows, places = scored.nonzero(as_tuple=True)
    share = (weights.double() / scored.sum(1))[rows]
    where = rows * labels.shape[1] + places
    targets = labels[rows, places + 1]
    ours, theirs = logits.detach().flatten(0, 1), dense.flatten(0, 1)
    grad = torch.zeros_like(ours)
    sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
    for part in torch.arange(len(where), device=where.device).split(max(1, CHUNK_ELEMENTS // ours.shape[1])):
        index, target, share_of = where[part], targets[part, None], share[part]
        log_p, log_q = ours[index].float().log_softmax(-1), theirs[index].float().log_softmax(-1)
        q = log_q.exp()
        losses = (-log_q.gather(1, target)[:, 0], -log_p.gather(1, target)[:, 0], (q * (log_q - log_p)).sum(1))
        sums += torch.stack([(loss * share_of).sum() for loss in losses])
        # (1 + factor) * p - factor * q, and 1 less at the target.
        slope = log_p.exp_().mul_(1 + factor).sub_(q.mul_(factor))
        slope[torch.arange(len(index), device=index.device), target[:, 0]] -= 1
        grad[index] = slope.mul_(share_of[:, None]).to(grad.dtype)
    dense_nll, nll, divergence = sums
    return Distilled(dense_nll, nll, divergence, grad.view_as(logits))
