"""Residual streams of calibration tokens, moved through a decoder one block at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gisp.data import Row, Sequences
from gisp.data.sequences import IGNORED
from gisp.errors import GispError
from gisp.model.modes import replaced_forward
from gisp.model.structures import LayerMap, ModelMap
from gisp.offload.stream import resident_or_streamed

_TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 4096}
# Relative difference of a layer taken apart from the layer itself; a wrong one is off by its own size.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True)
class Batch:
    """Token rows of similar length, padded on the right (causal attention does not look there).

    Attributes:
        ids: int64 [B, S] on the model's device.
        real: bool [B, S], False for padding; None where there is none.
        rows: number of every row in the data.
    """

    ids: torch.Tensor
    real: torch.Tensor | None
    rows: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of real tokens."""
        return self.ids.numel() if self.real is None else int(self.real.sum())

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """The states [B, S, n] of the real tokens, [T, n]."""
        return states.flatten(0, 1) if self.real is None else states[self.real]

    def row_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the real tokens of every row, float64 [B], of values [T]."""
        if self.real is None:
            return values.double().view(self.ids.shape).sum(1)
        table = torch.zeros(self.ids.shape, dtype=torch.float64, device=values.device)
        table[self.real] = values.double()
        return table.sum(1)


@dataclass(frozen=True)
class ResidualBlock:
    """One half of a decoder layer: ``x + projection(inputs(norm(x)))``."""

    name: str
    norm: Any
    body: Any
    projection: nn.Linear
    arguments: dict[Any, dict[str, Any]]
    """By shape of the token ids, what the decoder hands to the body beside the hidden states."""

    def run(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [B, S, width] of the output projection and its output [B, S, D], both unpruned."""
        held: list[torch.Tensor] = []
        hook = self.projection.register_forward_pre_hook(lambda _, args: held.append(args[0]))
        try:
            output = self.body(self.norm(states), **self.arguments.get(states.shape[:2], {}))
        finally:
            hook.remove()
        return held[0], output[0] if isinstance(output, tuple) else output


def batch_tokens(device: torch.device) -> int:
    """Tokens of a batch, but for longer rows."""
    return _TOKENS_PER_BATCH["cuda" if device.type == "cuda" else "cpu"]


def make_batches(ids_of: Sequence[torch.Tensor], device: torch.device, per_batch: int | None = None) -> list[Batch]:
    """Rows of token ids, int64 [S] each, long ones first, about ``per_batch`` tokens in a batch."""
    rows = sorted(enumerate(ids_of), key=lambda row: len(row[1]), reverse=True)
    most = per_batch or batch_tokens(device)
    batches = []
    while rows:
        length = len(rows[0][1])
        count = max(1, most // length)
        chosen, rows = rows[:count], rows[count:]
        ids = nn.utils.rnn.pad_sequence([row for _, row in chosen], batch_first=True).to(device)
        lengths = torch.tensor([len(row) for _, row in chosen])
        real = (torch.arange(length)[None] < lengths[:, None]).to(device)
        numbers = tuple(number for number, _ in chosen)
        batches.append(Batch(ids, None if bool((lengths == length).all()) else real, numbers))
    return batches


def next_tokens(batch: Batch, data: Sequences) -> torch.Tensor:
    """The token that follows each real token of a batch, int64 [T] on its device; -100 where it is not scored.

    Wrong answers are to be unlikely: none of their tokens is scored.
    """
    labels = torch.full(batch.ids.shape, IGNORED)
    for place, number in enumerate(batch.rows):
        ids, scored = data.rows[number]
        if not data.signs or data.signs[number] > 0:
            labels[place, : len(ids) - 1] = scored[1:]
    return batch.tokens(labels.to(batch.ids.device)[..., None])[:, 0]


def first_tokens(rows: Sequence[Row], tokens: int) -> list[torch.Tensor]:
    """The token ids of the first ``tokens`` tokens of rows."""
    chosen = []
    for ids, _ in rows:
        if tokens <= 0:
            break
        chosen.append(ids[:tokens])
        tokens -= len(ids)
    return chosen


class Decoder:
    """A dense decoder taken apart into embeddings and blocks.

    Attributes:
        visits: how its layers come; blocks run while their layer is visited.

    Raises:
        GispError: its layers compute something else than two such blocks.
    """

    def __init__(self, model_map: ModelMap, batches: list[Batch]) -> None:
        self._layers = model_map.layers
        self._arguments: list[dict[Any, dict[str, Any]]] = [{} for _ in model_map.layers]
        self.visits = resident_or_streamed(model_map.model)
        with self.visits.visiting([]):
            self.embedded = [self._embed(model_map.model, batch.ids) for batch in batches]
        # A process may have nothing of a text that several share.
        if batches:
            with self.visits.visiting([0]), self.visits.visit(0):
                self._check()

    def blocks(self, item: LayerMap) -> tuple[ResidualBlock, ResidualBlock]:
        """Attention and MLP of a layer, named like their groups."""
        layer = item.layer
        arguments = self._arguments[item.index]
        norms = layer.input_layernorm, layer.post_attention_layernorm
        return (
            ResidualBlock(item.heads.name, norms[0], item.attention, item.attention.o_proj, arguments),
            ResidualBlock(item.channels.name, norms[1], layer.mlp, layer.mlp.down_proj, {}),
        )

    def _embed(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, S, D], and in passing what every layer is called with."""
        held: list[torch.Tensor] = []

        def record(index: int) -> Any:
            def forward(hidden_states: torch.Tensor, *args: Any, **arguments: Any) -> torch.Tensor:
                if not held:
                    held.append(hidden_states)
                self._arguments[index][ids.shape] = arguments
                return hidden_states

            return forward

        with contextlib.ExitStack() as stack:
            for item in self._layers:
                stack.enter_context(replaced_forward(item.layer, record(item.index)))
            model.model(input_ids=ids, use_cache=False)
        return held[0]

    def _check(self) -> None:
        """Compare the first layer with its two blocks: other decoders scale, norm or join their parts differently."""
        item, states = self._layers[0], self.embedded[0]
        expected = item.layer(states, **self._arguments[0][states.shape[:2]])
        expected = expected[0] if isinstance(expected, tuple) else expected
        for block in self.blocks(item):
            states = states + block.run(states)[1]
        distance = float((states.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
        if not distance <= _TOLERANCE[states.dtype]:
            raise GispError(
                f"layer 0 is not an attention and an MLP block each added to its input (it is off by {distance:.0e}): "
                "this model type cannot be compensated"
            )
