"""Layers move between stages when pruning has made some stages lighter than others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import LayerMap
from gisp.stages.costs import layer_costs
from gisp.stages.group import Stages
from gisp.stages.load import put
from gisp.stages.placement import replaced

# Steps between two looks at the borders.
EVERY = 20


@torch.no_grad()
def rebalance(stages: Stages, shrinkable: ShrinkableModel, lowest: int, passes: int) -> int:
    """Move layers to where a step ends earlier by what layers cost now; every process decides alike.

    A layer moves with what was removed of it, so that steps stay reversible, and computes there what it computed here.

    Args:
        lowest: number of the lowest layer that is scored.
        passes: batches of a step in a replica.

    Returns:
        How many layers moved.
    """
    now = stages.placement
    assert now is not None
    new = replaced(layer_costs(shrinkable.map, lowest), now, [1] * passes)
    moves = [
        (item, source, target)
        for item, source, target in zip(shrinkable.map.layers, now.owners(), new.owners(), strict=True)
        if source != target
    ]
    # Lines are between neighbours alone. A border that is to move by more waits until others have moved.
    if any((target - source) % stages.count not in (1, stages.count - 1) for _, source, target in moves):
        return 0
    for item, source, target in moves:
        if stages.stage == source:
            _send(stages, shrinkable, item, target)
        elif stages.stage == target:
            _receive(stages, shrinkable, item, source)
    stages.placement = new
    return len(moves)


def _send(stages: Stages, shrinkable: ShrinkableModel, item: LayerMap, target: int) -> None:
    """Send a layer, and keep its shapes alone."""
    for group in (item.heads, item.channels):
        storage = [tensor.contiguous() for tensor in shrinkable.storage(group.name)]
        for tensor in storage:
            stages.wait(stages.send(tensor, target))
        shrinkable.house(group.name, [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in storage])
    for parameter in [*_others(item)]:
        stages.wait(stages.send(parameter.detach().contiguous(), target))
        put(item.layer, parameter, torch.empty_like(parameter, device="meta"))


def _receive(stages: Stages, shrinkable: ShrinkableModel, item: LayerMap, source: int) -> None:
    """Take a layer."""
    device = stages.device
    for group in (item.heads, item.channels):
        storage = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in shrinkable.storage(group.name)]
        for tensor in storage:
            stages.wait(stages.receive(tensor, source))
        shrinkable.house(group.name, storage)
    for parameter in [*_others(item)]:
        tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        stages.wait(stages.receive(tensor, source))
        put(item.layer, parameter, tensor)


def _others(item: LayerMap) -> Iterator[nn.Parameter]:
    """Parameters of a layer that no structure owns a part of."""
    owned = set()
    for group in (item.heads, item.channels):
        for projection in group.projections:
            bias = projection.linear.bias if projection.axis == "row" else None
            owned |= {id(projection.linear.weight), id(bias)}
    yield from (parameter for _, parameter in item.layer.named_parameters() if id(parameter) not in owned)
