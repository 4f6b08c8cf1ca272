"""Negative log-likelihood of tokens, and its gradient written over the logits."""

from __future__ import annotations

import torch

from gisp_kernels import backend as backends

SUPPORTED = ("triton",)
IGNORED = -100


def token_nll_grad_(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """NLL of every token in nats; ``logits`` becomes ``weights * (softmax - one_hot)``.

    Args:
        logits: [T, V], any vocabulary; overwritten.
        targets: int64 [T], -100 = not scored: NLL and gradient 0.
        weights: float32 [T], weight of each token in the loss.
        backend: ``None`` or ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        float32 [T].
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or weights.shape != targets.shape:
        raise ValueError(
            f"logits [T, V], targets [T], weights [T] do not fit: {logits.shape}, {targets.shape}, {weights.shape}"
        )
    if backends.resolve(backend, logits, SUPPORTED) == "triton":
        from gisp_kernels.triton_kernels import cross_entropy as kernel

        return kernel.launch(logits, targets, weights)
    value = logits.float()
    scored = targets != IGNORED
    index = targets.clamp_min(0)[:, None]
    log_sum = value.logsumexp(1)
    nll = torch.where(scored, log_sum - value.gather(1, index)[:, 0], 0.0)
    gradient = (value - log_sum[:, None]).exp()
    gradient.scatter_add_(1, index, torch.full_like(gradient[:, :1], -1.0))
    # Not a product with 0: a row that is not scored may hold infinities.
    logits.copy_(torch.where(scored[:, None], gradient * weights[:, None], 0.0))
    return nll
