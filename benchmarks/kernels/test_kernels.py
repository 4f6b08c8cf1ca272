"""The quick kernel benchmarks under pytest-benchmark, whose statistics compare runs; wall time of one finished call.

For numbers to quote use ``gisp bench kernels``: there the launch is not timed and ceilings come from the same run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.common.measure import restorer, rotation
from benchmarks.common.task import Implementation, Prepared, checked
from benchmarks.kernels.run import all_tasks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TASKS = {task.name: task.prepare for task in all_tasks(quick=True) if task.prepare is not None}
_MOST_IMPLEMENTATIONS = 8
_ROUNDS = 20


@dataclass
class Ready:
    """A task's operands, and its implementations with the reason why one is wrong."""

    name: str
    prepared: Prepared
    implementations: list[tuple[str, Implementation]]
    wrong: dict[str, str]


@pytest.fixture(scope="module", params=list(TASKS))
def ready(request: pytest.FixtureRequest) -> Iterator[Ready]:
    torch.manual_seed(0)
    prepared = TASKS[request.param]()
    every = [*prepared.implementations.items(), *prepared.parts.items()]
    yield Ready(request.param, prepared, every, checked(prepared)[1])
    torch.cuda.empty_cache()


@pytest.mark.parametrize("number", range(_MOST_IMPLEMENTATIONS))
def test_kernel(benchmark: Any, ready: Ready, number: int) -> None:
    assert len(ready.implementations) <= _MOST_IMPLEMENTATIONS
    if number >= len(ready.implementations):
        pytest.skip("this op has fewer implementations")
    name, function = ready.implementations[number]
    assert name not in ready.wrong, ready.wrong[name]
    benchmark.group, benchmark.name = ready.name, name
    inputs = ready.prepared.inputs
    restore = restorer(inputs) if ready.prepared.in_place else None
    copies = itertools.cycle([inputs] if restore else rotation(inputs))

    def setup() -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        if restore:
            restore()
        torch.cuda.synchronize()
        return next(copies), {}

    def run(*operands: torch.Tensor) -> None:
        function(*operands)
        torch.cuda.synchronize()

    benchmark.pedantic(run, setup=setup, rounds=_ROUNDS, warmup_rounds=3)
