"""Objective choice on a GPU: the scores of the CPU, the same ones every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from question_cases import answers, letters, mixed
from score_cases import gradient_scorer
from tiny import tiny_model

from gisp.model.structures import map_model

pytestmark = pytest.mark.gpu


def scored(device: str, data: Any, **options: Any) -> Any:
    model_map = map_model(tiny_model("llama-gqa").to(device))
    scorer = gradient_scorer(model_map, data, engine="stream", batch_size=None, batch_tokens=10**6, seed=0, **options)
    found = scorer.score(1, model_map.groups)
    assert scorer.refused is None
    return found


@pytest.mark.parametrize("make", [answers, letters, mixed])
@pytest.mark.parametrize("criterion", ["gisp", "second-order", "signed"])
def test_scores_are_those_of_the_cpu(make: Any, criterion: str) -> None:
    first_order = "shrunk" if criterion == "second-order" else "plain"
    options: dict[str, Any] = {"criterion": criterion, "first_order": first_order}
    here, there, again = (scored(device, make(), **options) for device in ("cpu", "cuda", "cuda"))
    assert there.loss.item() == pytest.approx(here.loss.item(), rel=1e-4)
    for name, values in here.scores.items():
        assert torch.equal(there.scores[name], again.scores[name])
        torch.testing.assert_close(there.scores[name].cpu(), values, rtol=1e-3, atol=1e-4 * float(values.abs().max()))
