"""Decoding at the right place."""

from __future__ import annotations

import torch

from benchmarks.common.registry import MODELS
from benchmarks.infer.measure import Setting, decode_step
from benchmarks.infer.shapes import build_pruned, pruned_layers

CPU = torch.device("cpu")
TINY = MODELS["tiny"]


def test_a_decoded_token_follows_its_context() -> None:
    model = build_pruned(TINY, pruned_layers(TINY, 0.4), CPU, torch.float32)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    step = decode_step(model, 3, Setting(prompt=4, context=9, batches=(3,), repetitions=1, graph=True))
    with torch.no_grad():
        first = step()
        # Every call decodes the same place of the cache.
        torch.testing.assert_close(step(), first)
        whole = model(input_ids=torch.cat((seen[0], torch.zeros(3, 1, dtype=torch.int64)), dim=1)).logits
    torch.testing.assert_close(first[:, 0], whole[:, -1])
