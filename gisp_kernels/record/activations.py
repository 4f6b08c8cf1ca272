"""Recording statistics of what enters Linear layers: count, mean and sum of squared deviations of every input channel.

They are what activation-aware pruning scores (Wanda, FLAP, OWL) and bias compensation are made of. Batches are merged
by the pairwise update of Chan, Golub and LeVeque (1979) in float64 around a batch's own mean, so that a variance that
is small beside its mean is not lost. Everything stays on the layers' devices and nothing waits for them; the order of
all sums is fixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from gisp_kernels.ops.importance import as_tokens
from gisp_kernels.record.attach.copying import Uncopyable

# So many elements are taken at a time, which bounds the float32 copies of 16-bit inputs.
_CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class ActivationStatistics:
    """Statistics of one layer's input over the counted tokens; tensors on the layer's device.

    Attributes:
        count: 0-dim float64, tokens.
        mean: float64 [in_features].
        deviation: float64 [in_features], sum over tokens of ``(x - mean)^2``.
    """

    count: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor

    @property
    def sum(self) -> torch.Tensor:
        """Sum over tokens, float64 [in_features]."""
        return self.count * self.mean

    @property
    def sumsq(self) -> torch.Tensor:
        """Sum of squares over tokens, float64 [in_features]."""
        return self.deviation + self.count * self.mean.square()

    @property
    def variance(self) -> torch.Tensor:
        """Mean squared deviation from the mean (divided by ``count``), float64 [in_features]; zero without tokens."""
        return self.deviation / self.count.clamp_min(1)

    def merged(self, other: ActivationStatistics) -> ActivationStatistics:
        """Statistics of both sets of tokens together."""
        count = self.count + other.count
        share = other.count / count.clamp_min(1)
        delta = other.mean - self.mean
        return ActivationStatistics(
            count,
            self.mean + delta * share,
            self.deviation + other.deviation + delta.square() * (self.count * share),
        )


def statistics_of(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> ActivationStatistics:
    """Statistics of one matrix of tokens.

    Args:
        tokens: [T, I], floating point.
        mask: bool [T], the tokens that count; ``None`` = all. What a token left out holds does not matter.
    """
    total = ActivationStatistics(
        torch.zeros((), dtype=torch.float64, device=tokens.device),
        *torch.zeros(2, tokens.shape[1], dtype=torch.float64, device=tokens.device),
    )
    rows = max(1, _CHUNK_ELEMENTS // max(1, tokens.shape[1]))
    for start in range(0, tokens.shape[0], rows):
        counted = None if mask is None else mask[start : start + rows]
        total = total.merged(_of_chunk(tokens[start : start + rows], counted))
    return total


def _of_chunk(tokens: torch.Tensor, mask: torch.Tensor | None) -> ActivationStatistics:
    if mask is None:
        count = torch.full((), tokens.shape[0], dtype=torch.float64, device=tokens.device)
    else:
        count = mask.sum(dtype=torch.float64)
        tokens = torch.where(mask[:, None], tokens, 0)
    mean = tokens.sum(0, dtype=torch.float64) / count.clamp_min(1)
    # Deviations from a rounded mean are exact in float32 near it. The last line takes back what the rounding moved.
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    centre = mean.to(wide.dtype)
    deviations = wide - centre
    if mask is not None:
        deviations = torch.where(mask[:, None], deviations, 0)
    squares = deviations.square_().sum(0, dtype=torch.float64)
    return ActivationStatistics(count, mean, (squares - count * (mean - centre).square()).clamp_min(0))


class ActivationRecorder(Uncopyable):
    """Statistics collected while active as a context manager; made by :func:`record_activations`.

    Attributes:
        mask: bool, shaped like the inputs without their last dimension: the tokens of the coming forward passes that
            count (padding does not); ``None`` = all.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.mask: torch.Tensor | None = None
        self._linears = dict(linears)
        self._found: dict[str, ActivationStatistics] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def statistics(self) -> dict[str, ActivationStatistics]:
        """Statistics of every layer so far; a layer that was not called counts no token."""
        return {
            name: self._found.get(name) or statistics_of(linear.weight.detach().new_empty(0, linear.weight.shape[1]))
            for name, linear in self._linears.items()
        }

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._found.clear()

    def __enter__(self) -> ActivationRecorder:
        if self._handles:
            raise RuntimeError("this recorder is already active")
        for name, linear in self._linears.items():
            self._handles.append(linear.register_forward_pre_hook(partial(self._take, name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _take(self, name: str, linear: nn.Module, inputs: tuple[Any, ...]) -> None:
        input: torch.Tensor = inputs[0].detach()
        mask = self.mask
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != input.shape[:-1]:
                raise ValueError(
                    f"layer {name!r}: the mask must be bool {tuple(input.shape[:-1])}, "
                    f"got {mask.dtype} {tuple(mask.shape)}"
                )
            mask = mask.to(input.device).flatten()
        with torch.autocast(input.device.type, enabled=False):
            found = statistics_of(as_tokens(input), mask)
        before = self._found.get(name)
        if before is not None:
            if before.mean.shape != found.mean.shape:
                raise RuntimeError(
                    f"layer {name!r} took {before.mean.shape[0]} channels before and {found.mean.shape[0]} now: "
                    "read the statistics before changing widths and call reset() after"
                )
            found = before.merged(found)
        self._found[name] = found


def record_activations(linears: Mapping[str, nn.Linear] | Iterable[nn.Linear] | nn.Linear) -> ActivationRecorder:
    """Recorder of input statistics, a context manager to put around any forward passes.

    ::

        with record_activations({"down": mlp.down_proj}) as recorder:
            for ids, real in batches:
                recorder.mask = real  # bool [B, S], False on padding
                model(ids)
        found = recorder.statistics()["down"]  # count, mean, variance, sum, sumsq

    With activation checkpointing a forward repeated inside a backward pass counts again: record around forward passes
    without gradients.

    Args:
        linears: the layers, by name; without names they are named by position.

    Raises:
        TypeError: something in ``linears`` is no ``nn.Linear``.
        ValueError: (while active) the mask does not fit the input.
        RuntimeError: (on entering) already active; (while active) a layer changed its width.
    """
    if isinstance(linears, nn.Linear):
        linears = [linears]
    if isinstance(linears, nn.Module) and not isinstance(linears, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        raise TypeError(f"linears must be nn.Linear layers, got {type(linears).__name__}: give those of it to record")
    named = linears if isinstance(linears, Mapping) else {str(i): linear for i, linear in enumerate(linears)}
    for name, linear in named.items():
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"layer {name!r} must be an nn.Linear, got {type(linear).__name__}")
    return ActivationRecorder(named)
