"""A captured pass over a prompt computes what the eager one does."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.registry import MODELS
from benchmarks.infer.measure import Setting, captured, measure_inference
from benchmarks.infer.shapes import build_pruned, pruned_layers

pytestmark = pytest.mark.gpu


@torch.no_grad()
def test_a_captured_prefill_is_the_eager_one() -> None:
    tiny, gpu = MODELS["tiny"], torch.device("cuda")
    model = build_pruned(tiny, pruned_layers(tiny, 0.4), gpu, torch.bfloat16)
    ids = torch.randint(0, tiny.vocabulary, (1, 64), device=gpu)

    def prefill() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        return logits

    replay = captured(prefill, gpu)
    for _ in range(2):
        ids.copy_(torch.randint_like(ids, tiny.vocabulary))
        assert torch.equal(replay(), prefill())
    setting = Setting(prompt=64, context=8, batches=(1,), repetitions=1, graph=True)
    assert measure_inference(model, setting)["captured_prefill_ms"] > 0
