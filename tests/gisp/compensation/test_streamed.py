"""Compensation of layers in host memory: the bits of the model on the device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from compensation_oracle import REMOVED, kept_of, rows, weight_of
from tiny import FAMILIES, tiny_model, tiny_tokens

from gisp.compensation import Compensation, CompensationOptions, compensate, fit_compensation
from gisp.compensation.pruned import batch_sizes, student
from gisp.errors import GispError
from gisp.model.keep import Keep
from gisp.model.shrink import ShrinkableModel
from gisp.model.structures import map_model
from gisp.offload.place import place

CPU = torch.device("cpu")
# Whole groups of heads and single ones, blocks without any structure, blocks that lost nothing.
EMPTY = {**REMOVED, "layers.1.heads": torch.arange(4), "layers.2.channels": torch.arange(24)}
PLACES: dict[str, dict[str, Any]] = {
    "all": {"streamed": (0, 1, 2, 3)},
    "inputs too": {"streamed": (0, 1, 2, 3), "inputs_on_host": True},
    "some": {"streamed": (1, 2)},
    "ends too": {"streamed": (1, 2), "ends_on_host": True},
    "ends alone": {"streamed": (), "ends_on_host": True},
}
METHODS: dict[str, dict[str, Any]] = {
    "lsq": {"target": "dense"},
    "rescale": {},
    "affine": {"intercept": False},
    "kfac": {"steps": 2, "tokens": 64},
    "rescale+kfac": {"steps": 1, "tokens": 40},
}


def fitted(model: Any, removed: dict[str, torch.Tensor], method: str, **options: Any) -> Compensation:
    kept = kept_of(model, removed)
    return fit_compensation(map_model(model), Keep.of(kept), rows(), CompensationOptions(method, **options))


def assert_same(found: Compensation, wanted: Compensation) -> None:
    assert found.results == wanted.results and len(found.updates) == len(wanted.updates) > 0
    for a, b in zip(found.updates, wanted.updates, strict=True):
        assert torch.equal(a.columns, b.columns) and torch.equal(weight_of(a), weight_of(b))


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("how", PLACES)
@pytest.mark.parametrize("refused", [None, "a test says so"], ids=["fused", "plain"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_same(
    method: str, refused: str | None, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "why_not", lambda *_: refused)
    model = tiny_model("llama-gqa")
    wanted = fitted(model, EMPTY, method, **METHODS[method])
    apart = tiny_model("llama-gqa")
    stream = place(apart, device=CPU, **PLACES[how])
    assert_same(fitted(apart, EMPTY, method, **METHODS[method]), wanted)
    assert stream.traffic.bytes > 0
    assert all(torch.equal(a, b) for a, b in zip(apart.parameters(), model.parameters(), strict=True))


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_finds_the_same(family: str) -> None:
    wanted = fitted(tiny_model(family), REMOVED, "kfac", steps=1, tokens=64)
    model = tiny_model(family)
    place(model, device=CPU, **PLACES["all"])
    assert_same(fitted(model, REMOVED, "kfac", steps=1, tokens=64), wanted)


@pytest.mark.usefixtures("accept_all")
def test_small_batches_in_groups_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches go through a layer together, several groups after each other, moments add up in host memory."""
    model = tiny_model("llama-mha")
    wanted = fitted(model, REMOVED, "kfac", steps=2, tokens=96)
    monkeypatch.setattr(batch_sizes, "_TOKENS_PER_BATCH", 16)
    # Inputs of four layers of 32 floats for two such batches.
    monkeypatch.setattr(batch_sizes, "_BATCH_BYTES", 2 * 16 * 4 * 32 * 4)
    place(model, device=CPU, **PLACES["all"])
    pruned = student.Student(map_model(model), Keep.of(kept_of(model, REMOVED)))
    for graphs in (True, False):
        assert {len(group) for group in pruned.groups(rows().rows, graphs=graphs)} == {1, 2}
    found = fitted(model, REMOVED, "kfac", steps=2, tokens=96)
    for a, b in zip(found.updates, wanted.updates, strict=True):
        assert torch.allclose(weight_of(a), weight_of(b), atol=1e-5 * float(weight_of(b).abs().max()))


@pytest.mark.usefixtures("accept_all")
def test_a_model_pruned_in_place_computes_with_it_and_goes_back() -> None:
    models = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    stream = place(models[1], device=CPU, **PLACES["all"])
    dense = [parameter.clone() for parameter in models[0].parameters()]
    logits, moved = [], []
    for model in models:
        shrinkable = ShrinkableModel(map_model(model))
        shrinkable.remove(REMOVED)
        compensate(model, rows(), method="kfac", steps=1, tokens=64)
        with torch.no_grad():
            logits.append(model(tiny_tokens(4, 16, seed=9)).logits)
        moved.append(shrinkable)
    assert torch.equal(*logits) and stream.traffic.bytes > 0
    for model, shrinkable in zip(models, moved, strict=True):
        shrinkable.rollback(1)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense, strict=True))


def test_what_layers_in_host_memory_have_no_place_for() -> None:
    model = tiny_model("llama-gqa")
    place(model, device=CPU, **PLACES["some"])
    ShrinkableModel(map_model(model)).remove(REMOVED)
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("gates", {}, "trains"),
        ("lsq+distil", {}, "trains"),
        ("affine", {}, "adds biases to"),
        ("lsq", {"intercept": True}, "adds biases to"),
    ]
    for method, options, what in refused:
        with pytest.raises(GispError, match=re.escape(f"--compensate {method} {what} layers that --offload")):
            compensate(model, rows(), method=method, **options)
