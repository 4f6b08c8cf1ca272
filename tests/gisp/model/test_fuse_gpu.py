"""``gisp.fuse`` on a GPU: bfloat16 logits as near to float32 as the plain model's, and a captured decode step."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_tokens

import gisp
from benchmarks.infer.measure import Setting, measure_inference
from gisp.model.fuse import FusedRMSNorm

pytestmark = pytest.mark.gpu


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_no_further_from_the_truth_than_the_plain_model(family):
    truth = tiny_model(family)
    ids = tiny_tokens(4, 24)
    expected = truth(input_ids=ids).logits
    plain = copy.deepcopy(truth).to("cuda", torch.bfloat16)
    fused = gisp.fuse(copy.deepcopy(plain))
    assert any(isinstance(module, FusedRMSNorm) for module in fused.modules())
    errors = [(m(input_ids=ids.cuda()).logits.float().cpu() - expected).norm() for m in (plain, fused)]
    assert errors[1] <= 1.5 * errors[0]


def test_decoding_replays_the_fused_kernels():
    model = tiny_model().to("cuda", torch.bfloat16)
    found = measure_inference(model, Setting(prompt=16, context=8, batches=(1, 2), repetitions=2, graph=True))
    assert found["prefill_ms"] > 0 and set(found["decode_ms"]) == {"1", "2"}
