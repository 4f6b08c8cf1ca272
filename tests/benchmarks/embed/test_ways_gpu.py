"""The ways in bfloat16 on a GPU: they agree, and ours needs less memory than gradients do."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.registry import Model
from benchmarks.embed.measure import measure_ways
from benchmarks.embed.subject import build_decoder, make_subject
from benchmarks.embed.ways import GRAD, STREAM

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_ways_agree(kv_heads: int) -> None:
    model = Model(2, hidden=1024, heads=8, kv_heads=kv_heads, head_dim=128, channels=2816, vocabulary=1000)
    rows = measure_ways(make_subject(model, build_decoder(model, 2, torch.device("cuda")), 512), 1)
    assert not [row for row in rows if "red" in row]
    extra = {row["way"]: row["extra_bytes"] for row in rows}
    assert extra[STREAM] < extra[GRAD]
