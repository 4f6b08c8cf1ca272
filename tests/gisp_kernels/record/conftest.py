from __future__ import annotations

import pytest
import torch
from recorder_oracle import Block


@pytest.fixture
def model() -> Block:
    return Block()


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randn(2, 7, 16)
