"""Implementations of the elementwise parts of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from task_cases import right_ones

from benchmarks.common.task import AUTO, Prepared
from benchmarks.kernels.tasks import decoder
from gisp_kernels.ops import decoder as ops

PREPARE: dict[str, Callable[[], Prepared]] = {
    "add_rms_norm": lambda: decoder._add_rms_norm(12, 40),
    "rms_norm_backward": lambda: decoder._rms_norm_backward(12, 40),
    "rotary": lambda: decoder._rotary(2 * decoder.LENGTH, 3 * 8, head_dim=8),
    "swiglu": lambda: decoder._swiglu(12, 40),
    "swiglu_backward": lambda: decoder._swiglu_backward(12, 40),
    "swiglu_backward_gates": lambda: decoder._swiglu_gates(2 * decoder.LENGTH, 24),
    "token_nll_grad": lambda: decoder._token_nll_grad(12, 40),
}


@pytest.mark.parametrize("op", PREPARE)
def test_decoder_implementations_agree(on_cpu: None, op: str) -> None:
    prepared = PREPARE[op]()
    before = [tensor.clone() for tensor in prepared.inputs]
    assert right_ones(prepared) == [AUTO, "eager"]
    assert all(torch.equal(a, b) for a, b in zip(prepared.inputs, before, strict=True)), "checks work on copies"
    results = prepared.implementations["eager"](*before)
    for number, result in enumerate(results):
        wrong = [r.clone() for r in results]
        wrong[number] = result * 1.01
        with pytest.raises(AssertionError, match=f"result {number} is off by"):
            prepared.check(lambda *_, wrong=wrong: wrong)


def test_a_plain_version_with_another_formula_is_noticed(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "swiglu", lambda gate, up, backend: torch.sigmoid(gate) * up)
    with pytest.raises(AssertionError, match="plain versions are off"):
        prepared = decoder._swiglu(12, 40)
        prepared.check(prepared.implementations["eager"])
