"""Compensation of layers in host memory beside a GPU: the bits of the model on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compensation_oracle import REMOVED, kept_of, weight_of
from tiny import tiny_model, tiny_tokens

from gisp.compensation import Compensation, CompensationOptions, fit_compensation
from gisp.compensation.pruned import batch_sizes, student
from gisp.data import Sequences
from gisp.model.keep import Keep
from gisp.model.structures import map_model
from gisp.offload.place import stream_layers

pytestmark = pytest.mark.gpu

LENGTHS = (32, 17, 24, 32, 9, 32) * 12


def fitted(model: Any, method: str) -> Compensation:
    ids = tiny_tokens(len(LENGTHS), max(LENGTHS), seed=5)
    data = Sequences.plain([(row[:n], row[:n].clone()) for row, n in zip(ids, LENGTHS, strict=True)])
    options = CompensationOptions(method, tokens=512, steps=None if method == "lsq" else 2)
    return fit_compensation(map_model(model), Keep.of(kept_of(model, REMOVED)), data, options)


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("refused", [None, "a test says so"], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lsq", "kfac"])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa"])
def test_the_bits_are_those_of_the_resident_model(
    family: str, method: str, dtype: torch.dtype, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "why_not", lambda *_: refused)
    # Layers run again from their inputs either way, several batches in a layer after each other.
    monkeypatch.setattr(batch_sizes, "_TOKENS_AGAIN", 256)
    monkeypatch.setattr(batch_sizes, "_BATCH_BYTES", 512 * 4 * 32 * 4)
    wanted = fitted(tiny_model(family).to("cuda", dtype), method)
    apart = tiny_model(family).to(dtype)
    stream = stream_layers(apart, torch.device("cuda"))
    found = fitted(apart, method)
    assert stream.traffic.bytes > 0 and found.results == wanted.results and found.updates
    for a, b in zip(found.updates, wanted.updates, strict=True):
        assert not weight_of(a).is_cuda and torch.equal(weight_of(a), weight_of(b).cpu())
    assert all(p.device.type == "cpu" for layer in apart.model.layers for p in layer.parameters())


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_engines_take_the_same_steps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = fitted(tiny_model("llama-gqa").to("cuda", dtype), "kfac")
    monkeypatch.setattr(student, "why_not", lambda *_: "a test says so")
    found = fitted(tiny_model("llama-gqa").to("cuda", dtype), "kfac")
    near = 2e-3 if dtype == torch.float32 else 0.05
    for result, same in zip(found.results, wanted.results, strict=True):
        assert result.kept == same.kept and result.after == pytest.approx(same.after, rel=near)
    for a, b in zip(found.updates, wanted.updates, strict=True):
        assert float((weight_of(a) - weight_of(b)).abs().max()) < near * float(weight_of(b).abs().max())
