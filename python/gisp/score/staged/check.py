"""Whether the fused pass computes what the split model computes: stage by stage, on one sequence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from gisp.model.modes import evaluation_mode
from gisp.score.fused.batch import MicroBatch, make_batch
from gisp.score.fused.layers import Flow, Layers, embedded
from gisp.score.fused.memory import Kept
from gisp.score.fused.support import distance_of
from gisp.stages.group import Stages
from gisp.stages.placement import Placement
from gisp.stages.stage_model import only_layers


@torch.no_grad()
def first_difference(
    stages: Stages,
    placement: Placement,
    chunks: Mapping[int, Layers],
    model: Any,
    weight: torch.Tensor,
    ids: torch.Tensor,
) -> str | None:
    """Where the pass differs from the model, the same answer in every process; ``None`` if nowhere.

    Args:
        chunks: layers of this process, by chunk.
        weight: one of the model's in this process.
        ids: int64 [1, S].
    """
    batch = make_batch(model.model, MicroBatch(ids, ids, [1.0]))
    found: dict[str, float] = {}
    last = len(placement.chunks) - 1
    for chunk, layers in sorted(chunks.items()):
        x: torch.Tensor | None = None
        if chunk:
            x = weight.new_empty(ids.shape[1], model.config.hidden_size)
            stages.wait(stages.receive(x, placement.stage_of(chunk - 1)))
        flow = embedded(model, batch) if x is None else Flow(batch, x.clone())
        layers.forward([flow], len(layers), Kept())
        hidden, delta = flow.leave()
        hidden = hidden if delta is None else hidden + delta
        with (
            evaluation_mode(model),
            only_layers(model.model, [item.layer for item in layers.items], ends=chunk == last) as decoder,
        ):
            given = {"input_ids": ids.to(weight.device)} if x is None else {"inputs_embeds": x[None]}
            expected = decoder(**given, use_cache=False).last_hidden_state
            distance = distance_of(decoder.norm(hidden), expected)
        if distance is not None:
            found[f"the hidden state after layer {layers.items[-1].index}"] = distance
        if chunk < last:
            stages.wait(stages.send(hidden.contiguous(), placement.stage_of(chunk + 1)))
    answers = [json.loads(answer) for answer in stages.processes.exchange(json.dumps(found).encode())]
    return next((f"{what} is off by {by:.1e}" for answer in answers for what, by in answer.items()), None)
