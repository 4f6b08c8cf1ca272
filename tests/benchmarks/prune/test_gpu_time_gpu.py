"""How long a GPU works on a pass."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.registry import MODELS
from benchmarks.common.synthetic import build_model, random_tokens
from benchmarks.prune.gpu_time import pass_gpu_time
from benchmarks.prune.measure import Setting
from gisp.model.structures import map_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("criterion", ["second-order", "gisp"])
def test_a_pass_of_more_tokens_works_longer_with_as_many_kernels(criterion: str) -> None:
    device, shape = torch.device("cuda"), MODELS["smollm2-135m"]
    model_map = map_model(build_model(shape, device, torch.bfloat16))
    tokens = random_tokens(shape, 64, 256)
    few, many = (
        pass_gpu_time(model_map, tokens, Setting.make(device, 0.5, 10, count, criterion=criterion))
        for count in (1024, 16384)
    )
    assert 0 < few["seconds"] < many["seconds"]
    assert 500 < few["kernels"] <= many["kernels"]
