"""Ragged sequences, pruned models and their scores by plain autograd."""

from __future__ import annotations

from typing import Any

import torch
from recorder_oracle import grad_of
from tiny import VOCAB, tiny_model

from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.data.sequences import IGNORED, row_weights
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import ModelMap, channels_name, heads_name, map_model
from gisp.score.context import Context
from gisp.score.gradient import GradientScorer
from gisp.score.objectives import sequence_nll

# Heads and channels lost per layer: none, few, uneven, and whole blocks.
REMOVALS = {
    "dense": {},
    "uneven": {heads_name(1): [2], heads_name(2): [0, 3], channels_name(0): [1, 5, 7], channels_name(3): [23]},
    "empty": {heads_name(1): [0, 1, 2, 3], channels_name(2): list(range(24)), heads_name(0): [1]},
}


def ragged(seed: int = 3) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in (16, 7, 12, 3, 9):
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = IGNORED
        rows.append((ids, labels))
    return Sequences.plain(rows)


def autograd_scores(model: Any, data: Sequences, signs: list[int]) -> dict[str, torch.Tensor]:
    """|W * G| of the set's loss, one sequence at a time, by plain backward passes."""
    weights = row_weights(signs)
    model.zero_grad()
    for (ids, labels), weight in zip(data.rows, weights, strict=True):
        (sequence_nll(model, ids[None], labels[None]).sum() * weight).backward()
    result = {}
    for group in map_model(model).groups:
        total = torch.zeros(group.count)
        for part in group.projections:
            product = (part.linear.weight * grad_of(part.linear.weight)).detach().abs()
            lines = product.sum(1 if part.axis == "row" else 0)
            total += lines.view(group.count, -1).sum(1)
        result[group.name] = total
    model.zero_grad()
    return result


def gradient_scorer(model_map: ModelMap, data: Sequences, loss: Any = None, **options: Any) -> GradientScorer:
    """A criterion of gradients on a model that may be pruned, by default the paper's."""
    if options.get("engine", "exact") == "exact":
        # Steps that see all data have no batch.
        options.pop("batch_tokens", None)
    config = make_config(**{"preset": "paper", "criterion": "gisp", "first_order": "plain", **options})
    shrinkable = ShrinkableModel.of(model_map.model) or ShrinkableModel(model_map)
    return GradientScorer(Context(shrinkable, data, config, loss))


def pruned(family: str, removal: str) -> tuple[Any, ModelMap]:
    model = tiny_model(family)
    model_map = map_model(model)
    shrinkable = ShrinkableModel(model_map)
    shrinkable.remove({name: torch.tensor(index) for name, index in REMOVALS[removal].items()})
    return model, model_map


def live(model_map: ModelMap) -> list[tuple[str, int]]:
    return [(group.name, group.count) for group in model_map.groups if group.count]
