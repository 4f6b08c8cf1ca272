"""Negative log-likelihood of tokens, and its gradient written over the logits."""

from __future__ import annotations

import torch

from gisp_kernels import backend as backends

IGNORED = -100


def token_nll(logits: torch.Tensor, targets: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """NLL of every token in nats.

    Args:
        logits: [T, V], any vocabulary.
        targets: int64 [T]; -100 = not scored: NLL 0. Any other value outside the vocabulary gives NaN.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        float32 [T].

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits [T, V] and targets [T] do not fit: {logits.shape}, {targets.shape}")
    if backends.resolve(backend, logits) == "triton":
        from gisp_kernels.triton.decoder import cross_entropy as kernel

        return kernel.launch(logits, targets, None, IGNORED)
    value = logits.float()
    return _nll(value, targets, _log_sum(value, targets))


def token_nll_grad_(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """NLL of every token in nats; ``logits`` becomes ``weights * (softmax - one_hot)``.

    Args:
        logits: [T, V], any vocabulary; overwritten.
        targets: int64 [T]; -100 = not scored: NLL and gradient 0. Any other value outside the vocabulary gives NaN.
        weights: float32 [T], weight of each token in the loss.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        float32 [T].

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or weights.shape != targets.shape:
        raise ValueError(
            f"logits [T, V], targets [T], weights [T] do not fit: {logits.shape}, {targets.shape}, {weights.shape}"
        )
    if backends.resolve(backend, logits) == "triton":
        from gisp_kernels.triton.decoder import cross_entropy as kernel

        return kernel.launch(logits, targets, weights, IGNORED)
    value = logits.float()
    log_sum = _log_sum(value, targets)
    nll = _nll(value, targets, log_sum)
    gradient = (value - log_sum[:, None]).exp()
    gradient.scatter_add_(1, _index(targets, logits), torch.full_like(gradient[:, :1], -1.0))
    # A row that is not scored may hold infinities, so a product with 0 would not do.
    logits.copy_(torch.where((targets != IGNORED)[:, None], gradient * weights[:, None], 0.0))
    return nll


def _index(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return targets.clamp(0, logits.shape[1] - 1)[:, None]


def _log_sum(value: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    known = (targets >= 0) & (targets < value.shape[1])
    return torch.where(known, value.logsumexp(1), float("nan"))


def _nll(value: torch.Tensor, targets: torch.Tensor, log_sum: torch.Tensor) -> torch.Tensor:
    return torch.where(targets != IGNORED, log_sum - value.gather(1, _index(targets, value))[:, 0], 0.0)
