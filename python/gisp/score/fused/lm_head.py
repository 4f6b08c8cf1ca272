"""The end of a pass: final norm, logits and their gradient in chunks of tokens, so that no full logits exist."""

from __future__ import annotations

from typing import Any

import torch

from gisp.data.sequences import IGNORED
from gisp.score.fused.batch import PassBatch
from gisp.score.fused.products import Products
from gisp_kernels.ops import decoder

# Elements of logits alive at a time: 256 MB in 16-bit precision, enough tokens for a fast product.
CHUNK_ELEMENTS = 2**27
TOKEN_MULTIPLE = 128


class LMHead:
    """Final norm and output projection of a model."""

    def __init__(self, model: Any, products: Products) -> None:
        self._norm = model.model.norm
        self._linear = model.get_output_embeddings()
        self._products = products

    @property
    def _chunk(self) -> int:
        """Tokens whose logits are alive at a time."""
        return max(1, CHUNK_ELEMENTS // self._linear.weight.shape[0] // TOKEN_MULTIPLE) * TOKEN_MULTIPLE

    def loss_and_grad(
        self, x: torch.Tensor, delta: torch.Tensor | None, batch: PassBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of the batch and its gradient.

        Args:
            x, delta: [T, D]; their sum is the input of the final norm.

        Returns:
            The weighted sum of token NLLs, 0-dim float64 in nats, and dL/dx [T, D].
        """
        norm, tokens = self._norm, x.shape[0]
        if batch.sources is not None:
            # Followers are predicted by copies of what predicts their leader's last token.
            x, delta = x if delta is None else x + delta, None
            x = torch.cat((x, x[batch.sources]))
        x, normed, rstd = decoder.add_rms_norm(x, delta, norm.weight.detach(), norm.variance_epsilon, total=delta)
        loss = torch.zeros((), dtype=torch.float64, device=x.device)
        size = self._chunk
        for start in range(0, len(normed), size):
            chunk = slice(start, start + size)
            logits = self._products.forward(normed[chunk], [self._linear])
            nll = decoder.token_nll_grad_(logits, batch.targets[chunk], batch.weights[chunk])
            loss += (nll.double() * batch.weights[chunk]).sum()
            # The chunk of the normed input is not needed any more: its gradient takes its place.
            torch.mm(logits, self._linear.weight.detach(), out=normed[chunk])
        grad = decoder.rms_norm_backward_(None, normed, x, rstd, norm.weight.detach())
        return loss, grad if batch.sources is None else _gathered(grad, tokens, batch)

    def token_nll(self, x: torch.Tensor, delta: torch.Tensor | None, batch: PassBatch) -> torch.Tensor:
        """NLL in nats of the scored tokens, then of the followers, float32, in their order.

        Args:
            x, delta: [T, D], the residual stream and what the last block adds to it, ``None`` for nothing.
        """
        places = (batch.targets[: len(x)] != IGNORED).nonzero()[:, 0]
        targets = batch.targets[places]
        if batch.sources is not None:
            targets = torch.cat((targets, batch.targets[len(x) :]))
            places = torch.cat((places, batch.sources))
        x = x[places] if delta is None else x[places] + delta[places]
        normed = decoder.add_rms_norm(x, None, self._norm.weight.detach(), self._norm.variance_epsilon)[1]
        size = self._chunk
        found = [
            decoder.token_nll(self._products.forward(part, [self._linear]), wanted)
            for part, wanted in zip(normed.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(found)


def _gathered(grad: torch.Tensor, tokens: int, batch: PassBatch) -> torch.Tensor:
    """Gradients [T + M, D] with those of copies added to their sources', in float32; [T, D]."""
    own, copies = grad[:tokens], grad[tokens:]
    assert batch.shared is not None
    places, which = batch.shared
    total = own[places].float().index_add_(0, which, copies.float())
    own[places] = total.to(grad.dtype)
    return own
