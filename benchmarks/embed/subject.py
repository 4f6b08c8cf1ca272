"""What is scored: decoder layers of real shape with random weights, and one backward pass over a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.common.registry import Model
from benchmarks.common.synthetic import build_model, random_tokens
from gisp_kernels import StructureGroup, iter_groups

LENGTH = 256


@dataclass(frozen=True)
class Subject:
    """A frozen decoder and a batch.

    Attributes:
        decoder: a transformers decoder without its output projection, whose cost does not shrink with the layers.
        groups: heads and channels of all its layers.
        ids: int64 [B, S].
        probe: [B, S, hidden], what the last hidden states are multiplied with in the loss.
    """

    decoder: Any
    groups: list[StructureGroup]
    ids: torch.Tensor
    probe: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def backward(self) -> None:
        """One forward and backward pass of a loss that is a sum over sequences."""
        hidden = self.decoder(input_ids=self.ids, use_cache=False).last_hidden_state
        (hidden.float() * self.probe).sum().div(self.ids.numel()).backward()


def build_decoder(model: Model, layers: int, device: torch.device) -> Any:
    """The first layers of a model of real shape, frozen: bfloat16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    decoder = build_model(replace(model, layers=layers), device, dtype).model
    return decoder.requires_grad_(False)


def make_subject(model: Model, decoder: Any, tokens: int) -> Subject:
    """A decoder with a batch of so many tokens in sequences of at most :data:`LENGTH`."""
    length = min(LENGTH, tokens)
    device = next(decoder.parameters()).device
    ids = random_tokens(model, tokens // length, length).to(device)
    generator = torch.Generator(device).manual_seed(0)
    probe = torch.randn(*ids.shape, model.hidden, device=device, generator=generator)
    return Subject(decoder, list(iter_groups(decoder)), ids, probe)
