"""Settings of every test: Triton's interpreter without a GPU, poisoned memory, seeds, skipped GPU tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import HAS_CUDA, repair_interpreter
from safetensors.torch import save_file

from gisp_kernels.backend import has_triton

# No test reads or fills the user's own cache of tokenised data.
os.environ["GISP_CACHE"] = "off"

if has_triton() and not HAS_CUDA:
    repair_interpreter()

# A device context looks torch's functions up on first use: before poisoned_memory puts others in their place.
with torch.device("meta"):
    torch.zeros(0)


# A single one of these lasts half a minute, which at the end leaves the other workers idle.
_LONG = tuple(
    f"tests/{name}"
    for name in ("kills/", "test_distributions.py", "gisp_kernels/test_forms.py", "gisp_kernels/triton/test_compile.py")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Modules and collected tests outlive all tests: garbage collections, which exports ask for, pass them by."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    # Libraries of compiled code complain of what is left at the end.
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeds() -> None:
    torch.manual_seed(20251018)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory the kernels package allocates without initialising holds NaN or garbage, never lucky zeros."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("gisp_kernels"):
            return tensor
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else 93)

    return poisoned


@pytest.fixture
def forked_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of several processes fork them from a server that has the imports done."""
    from ranks import launch_forked

    monkeypatch.setattr("gisp.replicas.launch.launch", launch_forked)
    for module in ("replicas", "stages"):
        monkeypatch.setattr(f"benchmarks.prune.{module}.launch", launch_forked)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk; its tokens are :func:`token_file`."""
    from tiny import tiny_model

    folder = tmp_path_factory.mktemp("models") / "gqa"
    tiny_model("llama-gqa").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import tiny_tokens

    path = tmp_path_factory.mktemp("tokens") / "t.safetensors"
    save_file({"input_ids": tiny_tokens(16, 16)}, path)
    return path
