"""What a plan counts of a compensation is no less than what it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compensation_oracle import REMOVED, kept_of
from tiny import tiny_model, tiny_tokens

from gisp.compensation import CompensationOptions
from gisp.compensation.demand import demand
from gisp.compensation.methods.fits import LeastSquaresFit
from gisp.compensation.methods.kfac import _Moments
from gisp.compensation.pruned import predictions
from gisp.compensation.pruned.student import Student
from gisp.data import Sequences
from gisp.model.keep import Keep
from gisp.model.structures import map_model
from gisp.offload.plan import Demand
from gisp.run.resources.placement import weights_of

CPU = torch.device("cpu")


def asked(method: str, removed: dict[str, torch.Tensor] = REMOVED, **options: Any) -> tuple[Demand, Student]:
    model = tiny_model("llama-gqa")
    model_map, keep = map_model(model), Keep.of(kept_of(model, removed))
    data = Sequences.plain([(row, row) for row in tiny_tokens(40, 16)])
    student = Student(model_map, keep)
    return demand(model_map, keep, CompensationOptions(method, **options), data, CPU), student


def size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("method", ["lsq", "rescale", "kfac"])
def test_what_lies_in_host_memory_is_counted(method: str) -> None:
    found, student = asked(method)
    weights = [projection.weight for projection in student.projections]
    beside = 2 * size(weights)
    if method == "kfac":
        moments = size([total for p in student.projections for total in _Moments(p).sums])
        beside = size(weights) + moments
    assert beside <= found.beside <= 2 * beside


def test_what_a_fit_takes_of_the_device_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Logits of tiny models are more than all of their activations.
    monkeypatch.setitem(predictions._LOGITS, "cpu", 1)
    found, student = asked("lsq")
    widest = max((projection.weight for projection in student.projections), key=lambda weight: weight.shape[1])
    sums = size(LeastSquaresFit(widest, intercept=False).sums)
    assert found.working > sums + size([widest])
    # Residual streams follow the tokens; those held out are measured, too.
    hidden = widest.shape[0]
    more = asked("lsq", tokens=400)[0].working - asked("lsq", tokens=100)[0].working
    assert more >= 2 * 4 * hidden * 300
    assert asked("lsq", target="dense")[0].working > found.working > asked("rescale")[0].working
    assert not found.inputs


def test_text_of_the_run_is_counted() -> None:
    model = tiny_model("llama-gqa")
    model_map, keep = map_model(model), Keep.of(kept_of(model, REMOVED))
    data, other = (Sequences.plain([(row, row) for row in tiny_tokens(40, 16, seed=seed)]) for seed in (0, 1))
    alone, beside, same = (
        demand(model_map, keep, CompensationOptions("lsq"), data, CPU, text).working for text in (None, other, data)
    )
    assert beside >= alone + 40 * 16 * model_map.hidden_size * 4 and same == alone


def test_inputs_wait_for_a_backward_pass() -> None:
    found, student = asked("kfac", tokens=200)
    assert found.inputs == 200 * student.projections[0].weight.shape[0] * 4
    assert found.beside > asked("lsq", tokens=200)[0].beside


def test_blocks_that_lost_nothing_ask_for_nothing() -> None:
    found, student = asked("kfac", {})
    assert not student.projections and not found.beside
    weights = weights_of(tiny_model("llama-gqa"))
    assert replace(found, inputs=0, working=0) == weights
