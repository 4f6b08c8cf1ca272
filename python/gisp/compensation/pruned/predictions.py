"""What a model's head predicts from last states; the same one serves the dense and the pruned model.

A chunk of tokens at a time, so that memory does not follow tokens x vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from gisp.model.structures import ModelMap

# Logits of either model alive at a time, in elements; about eight float32 tensors have this size.
_LOGITS_COPIES = 8
_LOGITS = {"cuda": 2**26, "cpu": 2**23}


class Predictions:
    """Divergences ``KL(dense || pruned)`` of the next token and losses of last states.

    Args:
        head: the output projection.
        device: computes.
    """

    def __init__(self, head: Any, device: torch.device) -> None:
        self._head, self._device = head, device

    def divergences(
        self, states: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Divergence and loss of every token, float32 [T] each.

        Args:
            states: last states of the pruned model, [T, D].
            wanted: of the dense one, [T, D].
            targets: next tokens, int64 [T], -100 where none is scored.
        """
        divergences, losses = [], []
        for chunk in self._chunks(len(wanted)):
            predicted, goal = self._both(states[chunk], wanted[chunk])
            divergences.append(_kl_div(predicted, goal))
            losses.append(_nll(predicted, targets[chunk]))
        return torch.cat(divergences), torch.cat(losses)

    def losses(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of every token, float32 [T]; arguments as of :meth:`divergences`."""
        return torch.cat([_nll(self._predicted(states[c]), targets[c]) for c in self._chunks(len(targets))])

    @torch.enable_grad()
    def gradient(self, states: torch.Tensor, wanted: torch.Tensor, scale: float) -> torch.Tensor:
        """Gradient [T, D] in the states of their summed divergence, multiplied by ``scale``."""
        gradient = torch.empty_like(states)
        for chunk in self._chunks(len(wanted)):
            part = states[chunk].detach().requires_grad_()
            total = _kl_div(*self._both(part, wanted[chunk])).sum() * scale
            (gradient[chunk],) = torch.autograd.grad(total, part)
        return gradient

    def _both(self, states: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the pruned and of the dense model, as :meth:`_predicted`."""
        with torch.no_grad():
            goal = self._predicted(wanted)
        return self._predicted(states), goal

    def _predicted(self, states: torch.Tensor) -> torch.Tensor:
        """Log probabilities, float32 [t, V]; finite, as models may rule out tokens (-inf)."""
        found: torch.Tensor = self._head(states).float().log_softmax(-1)
        return found.clamp_min(torch.finfo(torch.float32).min)

    def _chunks(self, tokens: int) -> Iterator[slice]:
        most = _chunk_tokens(self._head.weight.shape[0], self._device)
        return (slice(start, start + most) for start in range(0, tokens, most))


def logits_bytes(model_map: ModelMap, tokens: int, device: torch.device) -> int:
    """Memory of the logits of either model that are alive at a time, of so many tokens at most."""
    vocabulary = model_map.vocab_size
    return _LOGITS_COPIES * 4 * vocabulary * min(tokens, _chunk_tokens(vocabulary, device))


def _chunk_tokens(vocabulary: int, device: torch.device) -> int:
    return max(1, _LOGITS["cuda" if device.type == "cuda" else "cpu"] // vocabulary)


def _kl_div(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Divergence of log probabilities [t, V] from wanted ones, [t]."""
    return functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)


def _nll(predicted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of log probabilities [t, V], [t]."""
    return functional.nll_loss(predicted, targets, reduction="none")
