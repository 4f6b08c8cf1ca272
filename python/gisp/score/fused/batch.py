"""The tokens of one pass, on the device, with everything derived from them that all layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gisp.data.sequences import IGNORED
from gisp.score.objectives import last_predicting, sequence_curvature


@dataclass(frozen=True)
class PassBatch:
    """Sequences of one length, padded on the right; T = rows * length tokens, M further answers.

    Attributes:
        ids: int64 [T].
        targets: int64 [T + M], the token each position predicts, -100 = not scored, then the further answers.
        weights: float32 [T + M], weight of each token's NLL in the loss.
        sources: int64 [M], the position that predicts each further answer; None where there are none.
        shared: int64 [P] and [M], the positions among the sources once each, and which of them each source is.
        cos, sin: [length, hd], rotary tables.
        curvature: float32 [rows], see :func:`gisp.score.objectives.sequence_curvature`.
    """

    rows: int
    length: int
    ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    curvature: torch.Tensor
    sources: torch.Tensor | None = None
    shared: tuple[torch.Tensor, torch.Tensor] | None = None

    def by_sequence(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T, n] as [rows, length, n]."""
        return tokens.unflatten(0, (self.rows, self.length))


@dataclass(frozen=True)
class FurtherAnswers:
    """Tokens scored in the place of the last one of sequences, beside it.

    Attributes:
        rows: numbers of the sequences [M].
        tokens: the tokens [M].
        weights: weights of their NLL in the loss [M].
    """

    rows: list[int]
    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Units:
    """What of a batch is squared as one.

    Attributes:
        index: int64 [B], unit of every sequence.
        curvature: float32 [U], factors as of :func:`gisp_kernels.gate_sums`.
    """

    index: torch.Tensor
    curvature: torch.Tensor


def make_batch(
    decoder: Any,
    ids: torch.Tensor,
    labels: torch.Tensor,
    row_weights: list[float],
    further: FurtherAnswers | None = None,
) -> PassBatch:
    """A batch for the pass.

    Args:
        decoder: the model's decoder stack (``rotary_emb`` and weights).
        ids: int64 [B, S] on the CPU.
        labels: int64 [B, S], token ``t`` is predicted from tokens before it, -100 is not scored.
        row_weights: weight of each sequence's mean NLL.
        further: answers that share sequences.
    """
    rows, length = ids.shape
    device = decoder.embed_tokens.weight.device
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    scored = targets != IGNORED
    share = torch.tensor(row_weights, dtype=torch.float64) / scored.sum(1)
    weights = (share[:, None] * scored).float().flatten()
    targets, sources, shared = targets.flatten(), None, None
    if further is not None and further.rows:
        numbers = torch.tensor(further.rows)
        places = numbers * length + last_predicting(labels)[numbers]
        sources = _upload(places, device)
        once, which = places.unique(return_inverse=True)
        shared = _upload(once, device), _upload(which, device)
        targets = torch.cat((targets, torch.tensor(further.tokens)))
        weights = torch.cat((weights, torch.tensor(further.weights)))
    like = torch.empty(0, dtype=decoder.embed_tokens.weight.dtype, device=device)
    cos, sin = decoder.rotary_emb(like, position_ids=torch.arange(length, device=device)[None])
    return PassBatch(
        rows=rows,
        length=length,
        ids=_upload(ids.flatten(), device),
        targets=_upload(targets, device),
        weights=_upload(weights, device),
        cos=cos[0].contiguous(),
        sin=sin[0].contiguous(),
        curvature=_upload(sequence_curvature(labels, torch.tensor(row_weights, dtype=torch.float64)), device),
        sources=sources,
        shared=shared,
    )


def _upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
