"""Layers in host memory and a GPU: the resident run to the bit, registered memory, a peak that stays in its plan."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokens

import gisp
from gisp.model.structures import map_model
from gisp.offload.host import HostMemory
from gisp.offload.place import place
from gisp.offload.plan import Plan
from gisp.offload.stream import LayerStream
from gisp.run import prune as prune_module
from gisp.run.resources import placement

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "head_dim": 32}
RUNS: dict[str, dict[str, Any]] = {
    "fast": {},
    "in batches": {"batch_size": 3},
    "in slices": {"slices": 4},
    "query heads, odd widths": {"gqa": "query", "align": 1},
    "summed": {"preset": "paper", "batch_tokens": None, "batch_size": 8, "steps": 5},
    "of one batch": {"criterion": "gisp"},
    "signed": {"criterion": "signed", "batch_size": 4},
}


def model_of(dtype: torch.dtype, layers: int = 8, **shape: Any) -> Any:
    return tiny_model("llama-gqa", layers=layers, **{**SHAPE, **shape}).to(dtype)


def run(model: Any, **options: Any) -> Any:
    given = {"sparsity": 0.5, "steps": 12, "align": 16, "batch_tokens": 512, **options}
    return gisp.prune(model, tiny_tokens(64, 32), **given)


def assert_same(found: Any, expected: Any) -> None:
    assert [r.loss for r in found.steps] == [r.loss for r in expected.steps]
    for name, at in expected.removed_at.items():
        assert torch.equal(found.removed_at[name], at), name


@pytest.mark.parametrize("where", ["all", "some"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_resident_run(name: str, dtype: torch.dtype, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(model_of(dtype).cuda(), **RUNS[name])
    if where == "some":

        def some_layers(*of: Any) -> Plan:
            return Plan(placement.demand(map_model(of[0]), *of[1:]), (1, 2, 5), True, None, ends_on_host=True)

        monkeypatch.setattr(prune_module, "plan_of", some_layers)
    model = model_of(dtype)
    found = run(model, **RUNS[name], offload="always")
    assert_same(found, expected)
    stream = LayerStream.of(model)
    assert stream is not None
    traffic = stream.traffic
    assert traffic.bytes > 0 and traffic.seconds > 0 and 0 <= traffic.overlap <= 1
    devices = [{p.device.type for p in layer.parameters()} for layer in model.model.layers]
    streamed = range(8) if where == "all" else (1, 2, 5)
    assert devices == [{"cpu"} if i in streamed else {"cuda"} for i in range(8)]
    # The device reads the embedding's rows where they are.
    assert next(model.parameters()).device.type == "cuda"
    assert model.lm_head.weight.device.type == ("cuda" if where == "all" else "cpu")


@pytest.mark.parametrize("ends_on_host", [False, True])
def test_the_model_computes_as_the_resident_one(ends_on_host: bool) -> None:
    tokens = tiny_tokens(4, 32).cuda()
    resident, model = model_of(torch.bfloat16).cuda(), model_of(torch.bfloat16)
    place(model, tuple(range(8)), torch.device("cuda", 0), ends_on_host=ends_on_host)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(tokens).logits, resident(tokens).logits)


def test_host_memory_is_registered_and_given_back() -> None:
    model = model_of(torch.bfloat16, layers=2)
    place(model, (0, 1), torch.device("cuda", 0))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.is_pinned()
    again = model_of(torch.bfloat16, layers=2)
    del model
    del weight
    gc.collect()
    # Memory that comes again must not still be registered.
    place(again, (0, 1), torch.device("cuda", 0))
    assert again.model.layers[0].mlp.up_proj.weight.is_pinned()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_device_reads_host_memory(dtype: torch.dtype) -> None:
    memory = HostMemory(torch.device("cuda", 0))
    table = memory.empty((2**17, 4096), dtype)
    table.view(torch.uint8).random_(0, 120)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    seen = memory.seen(table)
    assert seen.device == torch.device("cuda", 0) and seen.data_ptr() == table.data_ptr()
    assert seen.shape == table.shape and seen.dtype == dtype and torch.cuda.memory_allocated() == before
    rows = torch.tensor([5, 0, 2**17 - 1, 5])
    assert torch.equal(seen.index_select(0, rows.cuda()).cpu(), table[rows])
    assert torch.equal(torch.nn.functional.embedding(rows.cuda(), seen).cpu(), table[rows])
    assert torch.equal(seen[7:9].cpu(), table[7:9]) and torch.equal(seen[7:9].clone().cpu(), table[7:9])
    table[3] = 1
    assert bool((seen[3] == 1).all())


def test_a_run_stays_within_its_memory() -> None:
    shape: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "head_dim": 64}
    # Of larger weights so many layers blow up rounding: the fused pass, which the plan counts with, would step back.
    shape["initializer_range"] = 0.02
    tokens = tiny_tokens(64, 64)
    options: dict[str, Any] = {"sparsity": 0.3, "steps": 2, "batch_tokens": 1024}
    whole = model_of(torch.bfloat16, layers=24, **shape)
    size = sum(p.numel() * 2 for p in whole.parameters())
    peaks = []
    try:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        expected = gisp.prune(model_of(torch.bfloat16, layers=24, **shape).cuda(), tokens, **options)
        peaks.append(torch.cuda.max_memory_allocated())
        # A model and what shrinks it hold one another.
        expected.model = None
        gc.collect()
        limit = int(0.6 * size)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = gisp.prune(whole, tokens, **options, offload="auto", gpu_memory=f"{limit / 1e6:.0f}MB")
        peaks.append(torch.cuda.max_memory_allocated())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same(found, expected)
    assert peaks[0] > size and peaks[1] <= limit
