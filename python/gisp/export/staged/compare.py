"""Logits of an export beside those of the masked base model, from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gisp.export.check import (
    ROUNDING,
    check_tokens,
    chunk_output,
    compare_logits,
    relative_difference,
    removed_columns,
)
from gisp.export.spec import TOLERANCE, PrunedSpec
from gisp.model.structures import ModelMap
from gisp.replicas.agreement import refusing_together
from gisp.stages.group import Stages
from gisp.stages.placement import Placement


def compare(
    base: Any, exported: Any, model_map: ModelMap, spec: PrunedSpec, stages: Stages, placement: Placement
) -> tuple[float, float, float]:
    """As :meth:`gisp.export.check.Reference.compare`, the same in every process."""
    removed = removed_columns(model_map, spec.keep)
    tokens = check_tokens(model_map.vocab_size, int(base.config.max_position_embeddings))
    held = [*placement.held(stages.stage)]

    def logits(model: Any, without: Mapping[nn.Module, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Logits in the last stage, a hidden state in others."""
        x = None
        if stages.stage:
            shape = (*tokens.shape, model_map.hidden_size)
            x = torch.empty(shape, dtype=dtype, device=model_map.weight.device)
            stages.wait(stages.receive(x, stages.stage - 1))
        ends = stages.stage == stages.count - 1
        layers = [model.model.layers[i] for i in held]
        found = chunk_output(model, layers, tokens if x is None else x, without, dtype, ends=ends)
        if not ends:
            stages.wait(stages.send(found.contiguous(), stages.stage + 1))
        return found.cpu()

    wanted, got = logits(base, removed, torch.float32), logits(exported, {}, torch.float32)
    last, exchange = stages.count - 1, stages.processes.exchange
    relative = float(exchange(repr(relative_difference(wanted, got)).encode())[last])
    tolerance = TOLERANCE
    if relative > TOLERANCE:
        truth = logits(base, removed, torch.float64)
        rounding = float(exchange(repr(relative_difference(truth, wanted.double())).encode())[last])
        tolerance = max(TOLERANCE, ROUNDING * rounding)
    absolute = 0.0
    with refusing_together(stages.processes):
        if stages.stage == last:
            absolute, _ = compare_logits(wanted, got, tolerance)
    return float(exchange(repr(absolute).encode())[last]), relative, tolerance
