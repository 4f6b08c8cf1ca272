"""The loss a run scores by: a loss per sequence, weighted over sequences.

The loss of a sequence is the mean NLL of its scored tokens, or a user's own, and the loss of a set the weighted sum
over its sequences, so batch size, padding and bucketing never change it beyond rounding. The objectives by name differ
in which tokens of which rows are scored (:mod:`gisp.data`) and in the sequences' weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gisp.config.options import OBJECTIVES
from gisp.data.sequences import IGNORED
from gisp.errors import GispError

# A user's own loss: (model, input_ids int64 [B, S], labels int64 [B, S]) -> loss per sequence, floating point [B].
# Rows are read as for objective ``lm``; second-order scores take the loss of a row for a mean over its tokens.
# Rows are padded on the right with token 0 and label -100; a row's loss must not depend on its padding or on the
# other rows of the batch. It must not touch gradients itself.
SequenceLoss = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def objective_name(loss: SequenceLoss) -> str:
    """The name a run records for a user's own loss: module and qualified name of the function, or of its class."""
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def check_built_in(objective: str) -> None:
    """Require one of the objectives by name.

    Raises:
        GispError: the name of a user's own loss, which only a run given the function has.
    """
    if objective not in OBJECTIVES:
        raise GispError(
            f"objective {objective} is a function's name: give gisp.prune the function itself, "
            f"or choose one of {', '.join(OBJECTIVES)}"
        )


def own_losses(loss: SequenceLoss, model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A user's loss of every sequence, fp32 [B].

    Raises:
        GispError: it does not return one floating-point number per sequence.
    """
    losses = loss(model, input_ids, labels)
    shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
    if not isinstance(losses, torch.Tensor) or shape != (len(input_ids),) or not losses.is_floating_point():
        raise GispError(
            f"objective {objective_name(loss)} returns {shape}: "
            f"give a floating-point tensor with one loss per sequence, here [{len(input_ids)}]"
        )
    return losses.float()


def sequence_nll(model: Callable[..., Any], input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean NLL in nats of each sequence's scored tokens, fp32 [B].

    Args:
        model: a causal language model returning ``logits`` [B, S, V].
        input_ids: int64 [B, S], padded on the right.
        labels: int64 [B, S]; token ``t`` is predicted from tokens before it, -100 is not scored.
    """
    losses = _token_nll(model(input_ids=input_ids, use_cache=False).logits, labels)
    return losses.sum(1) / (labels[:, 1:] != IGNORED).sum(1)


def answer_nll(
    model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of the scored tokens, fp32 in their order, and of others in the place of the last one of sequences, [M].

    Args:
        model, input_ids, labels: as of :func:`sequence_nll`.
        rows: int64 [M], numbers of the sequences.
        tokens: int64 [M], the other tokens.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits
    behind = logits[rows, last_predicting(labels)[rows]].float().log_softmax(-1)
    return _token_nll(logits, labels)[labels[:, 1:] != IGNORED], -behind.gather(1, tokens[:, None])[:, 0]


def last_predicting(labels: torch.Tensor) -> torch.Tensor:
    """Of every sequence the position that predicts its last scored token, the one before it; int64 [B]."""
    return (labels != IGNORED).long().cumsum(1).argmax(1) - 1


def _token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """NLL of every token but the first, fp32 [B, S - 1], 0 where it is not scored."""
    targets = labels[:, 1:]
    return functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        ignore_index=IGNORED,
        reduction="none",
    ).view(targets.shape)


def sequence_curvature(labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Factors of the squared gate gradients of every sequence, float32 [B]: its scored tokens by its absolute weight.

    They are for a loss ``sum_b w_b * (mean NLL of n_b tokens)``, see :func:`gisp_kernels.gate_sums`. A negative weight
    (``margin``) counts as curvature as well, whichever way its sequence pulls.

    Args:
        labels: int64 [B, S]; token ``t`` is predicted from tokens before it, -100 is not scored.
        weights: [B], weight of each sequence in the loss.
    """
    scored = (labels[:, 1:] != IGNORED).sum(1)
    size = weights.abs()
    return torch.where(size > 0, scored / torch.where(size > 0, size, 1), 0).float()
