"""Deterministic products: what the environment must say for torch to allow them, and says no longer afterwards."""

from __future__ import annotations

import os

import pytest
import torch

from gisp.model import modes

NAME = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    modes._let_multiply.cache_clear()
    yield
    modes._let_multiply.cache_clear()


@pytest.mark.parametrize("looks_every_time", [False, True])
def test_the_workspace_is_named_as_long_as_torch_looks_for_it(monkeypatch, looks_every_time):
    seen = []

    def multiply(device):
        assert torch.are_deterministic_algorithms_enabled()
        seen.append(os.environ.get(NAME))
        if looks_every_time and seen[-1] is None:
            raise RuntimeError("not deterministic")

    monkeypatch.setattr(modes, "_multiply", multiply)
    for _ in range(2):
        with modes.deterministic(torch.device("cuda")):
            assert os.environ.get(NAME) == (":4096:8" if looks_every_time else None)
    assert seen == [":4096:8", None]


def test_a_workspace_of_the_user_stays(monkeypatch):
    monkeypatch.setenv(NAME, ":16:8")
    monkeypatch.setattr(modes, "_multiply", lambda device: pytest.fail("nothing is to be found out"))
    with modes.deterministic(torch.device("cuda")):
        assert os.environ[NAME] == ":16:8"


def test_a_cpu_needs_none():
    with modes.deterministic(torch.device("cpu")):
        assert NAME not in os.environ
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
def test_products_of_a_gpu_are_allowed_and_repeat():
    device = torch.device("cuda")
    matrix = torch.randn(300, 4096, device=device).bfloat16()
    with modes.deterministic(device):
        one, other = (matrix @ matrix.T for _ in range(2))
    assert torch.equal(one, other)
