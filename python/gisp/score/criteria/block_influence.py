"""Block influence: how far a layer turns the residual stream (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from gisp.score.base import StepScores
from gisp.score.context import Context
from gisp_kernels.groups import StructureGroup


class BlockInfluence:
    """``BI = 1 - mean_t cos(x_t, y_t)`` of a layer's input and output; all its structures score that.

    Goes with :class:`gisp.select.whole_layers.LayerSelector`, which takes a layer whole or not at all.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def score(self, step: int, groups: list[StructureGroup]) -> StepScores:
        """Scores of ``groups`` at a step."""
        owners = {group.name: item for item in self._context.map.layers for group in (item.heads, item.channels)}
        layers = {owners[group.name].index: owners[group.name].layer for group in groups}
        recorder = CosineRecorder(layers)
        loss, tokens = self._context.forward_pass(step, recorder)
        influence = {index: (1 - recorder.mean_cosine(index)).float() for index in layers}
        scores = {group.name: influence[owners[group.name].index].expand(group.count) for group in groups}
        return StepScores.of(scores, loss, tokens)


class CosineRecorder:
    """Cosines between input and output of decoder layers while active as a context manager.

    Attributes:
        mask: bool [B, S], tokens of the coming passes that count; ``None`` = all.
    """

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        self.mask: torch.Tensor | None = None
        self._layers = layers
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def mean_cosine(self, index: int) -> torch.Tensor:
        """Mean over the counted tokens, 0-dim float64."""
        total, count = self._sums[index]
        return total / count.clamp_min(1)

    def __enter__(self) -> CosineRecorder:
        for index, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(partial(self._take, index), with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _take(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        counted = torch.ones_like(cosine, dtype=torch.bool) if self.mask is None else self.mask
        total = torch.where(counted, cosine, 0).sum(dtype=torch.float64)
        count = counted.sum(dtype=torch.float64)
        if index in self._sums:
            total, count = total + self._sums[index][0], count + self._sums[index][1]
        self._sums[index] = total, count
