"""The pruned model inside the dense one: what it makes, and that it is the masked model."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from compensation_oracle import columns, divergence, kept_of, projection, rows
from tiny import FAMILIES, tiny_model

from gisp.compensation.pruned.student import Student
from gisp.data import Sequences
from gisp.model.keep import Keep
from gisp.model.modes import frozen
from gisp.model.structures import map_model

# Of four heads two share a key/value head where any do.
REMOVALS: dict[str, dict[str, torch.Tensor]] = {
    "whole groups": {"layers.0.heads": torch.tensor([0, 1]), "layers.2.heads": torch.tensor([2, 3])},
    "single heads": {"layers.1.heads": torch.tensor([1, 2]), "layers.3.heads": torch.tensor([0])},
    "channels": {"layers.0.channels": torch.tensor([0, 5, 7]), "layers.3.channels": torch.arange(1, 24)},
    "all": {"layers.1.heads": torch.arange(4), "layers.2.channels": torch.arange(24)},
}


@pytest.mark.parametrize("longest", [16, None], ids=["fused", "plain"])
@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_masked_model(family: str, removal: str, longest: int | None) -> None:
    model, data = tiny_model(family), rows()
    weights = deepcopy(model.state_dict())
    kept = kept_of(model, REMOVALS[removal])
    pruned = Student(map_model(model), Keep.of(kept), longest)
    data = Sequences(data.rows, data.signs, tuple((row,) for row in range(len(data.rows))))
    with frozen(model):
        _, found = pruned.hold_out(data)
    assert (pruned._fused is not None) == (longest is not None)
    dense, other = deepcopy(model).double(), deepcopy(model).double()
    for name in REMOVALS[removal]:
        linear, width = projection(other, name)
        gone = torch.ones(linear.in_features, dtype=torch.bool)
        gone[columns(kept[name], width)] = False
        with torch.no_grad():
            linear.weight[:, gone] = 0
    for (ids, _), value in zip(data.rows, found.divergences.tolist(), strict=True):
        assert value == pytest.approx(float(divergence(dense, other, [ids]).detach()), rel=1e-4, abs=1e-6)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa"])
def test_blocks_make_what_is_read(family: str) -> None:
    made: dict[str, int] = {}

    def measured(name: str) -> Any:
        return lambda module, args, output: made.update({name: output.shape[-1]})

    model = tiny_model(family)
    for i, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if name.endswith("_proj"):
                module.register_forward_hook(measured(f"{i}.{name.split('.')[1]}"))
    removed = {**REMOVALS["whole groups"], **REMOVALS["single heads"], **REMOVALS["channels"]}
    pruned = Student(map_model(model), Keep.of(kept_of(model, removed)))
    with frozen(model):
        pruned.hold_out(rows())
    width = model.config.head_dim
    shared = family == "llama-gqa"
    keys = 2 if shared else 4
    # One head of a group alone has all of them made, and columns of the output gathered.
    heads = {0: (2, keys // 2), 1: (4, 2) if shared else (2, 2), 2: (2, keys // 2), 3: (4, 2) if shared else (3, 3)}
    for i, (queries, shares) in heads.items():
        assert made[f"{i}.q_proj"] == queries * width
        assert made[f"{i}.k_proj"] == made[f"{i}.v_proj"] == shares * width
    channels = {0: 21, 1: 24, 2: 24, 3: 1}
    assert all(made[f"{i}.{name}"] == count for i, count in channels.items() for name in ("gate_proj", "up_proj"))
