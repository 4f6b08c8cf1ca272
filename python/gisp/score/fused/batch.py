"""Sequences that pass through the model together, and everything derived from them that all layers share.

One-token answers of a question mostly differ in their last token alone. They share the pass of their prefix: one of
them, the leader, passes through the model, and the last tokens of the others, its followers, are scored beside its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from gisp.data.sequences import IGNORED
from gisp.score.objectives import last_predicting, sequence_curvature
from gisp_kernels import backend

# By the module that makes them the tables of the last length.
_tables: WeakKeyDictionary[Any, dict[tuple[int, torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class Followers:
    """Answers that share the prefix of a leading sequence, each scored by its last token.

    Attributes:
        rows: numbers of their leaders in the micro-batch [M].
        tokens: their last tokens [M].
        weights: weights of their NLL in the loss [M].
    """

    rows: list[int]
    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class SampleGroups:
    """Which sequences of a micro-batch are one sample of the curvature: their gradients are added, then squared.

    Attributes:
        index: int64 [B], sample of every sequence.
        curvature: float32 [samples], factors as of :func:`gisp_kernels.gate_sums`.
    """

    index: torch.Tensor
    curvature: torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that pass through the model together.

    Attributes:
        ids: int64 [B, S] on the CPU, padded on the right.
        labels: int64 [B, S], token ``t`` is predicted from tokens before it, -100 is not scored.
        weights: weight of each sequence's mean NLL in the loss [B].
        followers: answers that share passes, ``None`` for none.
        samples: ``None`` where every sequence is a sample by itself.
        positions: of the sequences and then of the followers in the step [B + M].
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: list[float]
    followers: Followers | None = None
    samples: SampleGroups | None = None
    positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class PassBatch:
    """Sequences of one length, padded on the right; T = rows * length tokens, M followers.

    Attributes:
        ids: int64 [T].
        targets: int64 [T + M], the token each position predicts, -100 = not scored, then those of followers.
        weights: float32 [T + M], weight of each token's NLL in the loss.
        sources: int64 [M], the position that predicts each follower; None where there are none.
        shared: int64 [P] and [M], the positions among the sources once each, and which of them each source is.
        cos, sin: [length, hd], rotary tables.
        curvature: float32 [rows], see :func:`gisp.score.objectives.sequence_curvature`.
        gates: group name -> [columns], what the input of its output projection is multiplied with; absent = 1.
        backend: what runs the ops, found once for the thousand calls of a pass.
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
    gates: Mapping[str, torch.Tensor] = field(default_factory=dict)
    backend: str | None = None

    def by_sequence(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T, n] as [rows, length, n]."""
        return tokens.view(self.rows, self.length, tokens.shape[1])


def make_batch(decoder: Any, micro: MicroBatch) -> PassBatch:
    """A micro-batch for the pass.

    Args:
        decoder: the model's decoder stack (``rotary_emb`` and weights).
    """
    labels, followers = micro.labels, micro.followers
    rows, length = micro.ids.shape
    device = decoder.embed_tokens.weight.device
    if device.type == "meta":
        # The embeddings lie in another process, tables of the rotation in every one.
        device = decoder.rotary_emb.inv_freq.device
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    scored = targets != IGNORED
    share = torch.tensor(micro.weights, dtype=torch.float64) / scored.sum(1)
    weights = (share[:, None] * scored).float().flatten()
    targets, sources, shared = targets.flatten(), None, None
    if followers is not None:
        numbers = torch.tensor(followers.rows)
        places = numbers * length + last_predicting(labels)[numbers]
        sources = _upload(places, device)
        once, which = places.unique(return_inverse=True)
        shared = _upload(once, device), _upload(which, device)
        targets = torch.cat((targets, torch.tensor(followers.tokens)))
        weights = torch.cat((weights, torch.tensor(followers.weights)))
    cos, sin = rotary_tables(decoder, length, device)
    return PassBatch(
        rows=rows,
        length=length,
        ids=_upload(micro.ids.flatten(), device),
        targets=_upload(targets, device),
        weights=_upload(weights, device),
        cos=cos,
        sin=sin,
        curvature=_upload(sequence_curvature(labels, torch.tensor(micro.weights, dtype=torch.float64)), device),
        sources=sources,
        shared=shared,
        backend=backend.resolve(None, cos),
    )


def plain_batch(decoder: Any, ids: torch.Tensor) -> PassBatch:
    """Sequences that pass through the layers alone, int64 [B, S] on the device: they have no loss."""
    none = torch.zeros(0, device=ids.device)
    rows, length = ids.shape
    cos, sin = rotary_tables(decoder, length, ids.device)
    kind = backend.resolve(None, cos)
    return PassBatch(rows, length, ids.flatten(), none.long(), none, cos, sin, curvature=none, backend=kind)


def rotary_tables(decoder: Any, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions from 0 on, [length, hd] in the model's dtype."""
    rotation, dtype = decoder.rotary_emb, decoder.embed_tokens.weight.dtype
    # Of these the frequencies follow the lengths that were seen.
    if getattr(rotation, "rope_type", "dynamic") in ("dynamic", "longrope"):
        return _made_tables(rotation, length, dtype, device)
    # A step asks for every slice.
    known = _tables.setdefault(rotation, {})
    key = (length, dtype, device)
    if key not in known:
        known.clear()
        known[key] = _made_tables(rotation, length, dtype, device)
    return known[key]


def _made_tables(
    rotation: Any, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    like = torch.empty(0, dtype=dtype, device=device)
    cos, sin = rotation(like, position_ids=torch.arange(length, device=device)[None])
    return cos[0].contiguous(), sin[0].contiguous()


def _upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
