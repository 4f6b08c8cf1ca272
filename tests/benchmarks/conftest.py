"""Benchmark tasks without a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common import task
from benchmarks.common.measure import Measurement
from benchmarks.kernels import sweep
from benchmarks.kernels.tasks import decoder, float8, gates, importance, products, recording


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands of tasks in float32 on the CPU; nothing is timed."""

    def random_matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape)

    for module in (decoder, float8, gates, importance, products, recording, sweep):
        monkeypatch.setattr(module, "random_matrix", random_matrix)
    monkeypatch.setattr(task, "rotation", lambda inputs: [inputs])
    monkeypatch.setattr(task, "restorer", lambda inputs: None)
    timed = Measurement(2.0, 1.5, 2.5, 1.0, 3.0, 7, 2**20)
    monkeypatch.setattr(task, "measure_together", lambda functions, *_, **__: dict.fromkeys(functions, timed))
