"""Words of messages: long values are cut, the remedy stays, and whatever says that memory ran out is known for it."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from gisp.cli import main
from gisp.errors import GispError, is_out_of_memory, quoted


def nested(levels: int) -> list[object]:
    """A list of ten lists of ten lists, one object a level: short in a file, endless as text."""
    value: list[object] = ["x"] * 10
    for _ in range(levels):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    "value",
    ["a" * 100000, 10**400, 10**100000, nested(60), {"k" * 9999: 1}, b"x" * 9999],
    ids=lambda value: type(value).__name__,
)
def test_a_long_value_is_cut(value: object) -> None:
    assert len(quoted(value)) < 100


@pytest.mark.parametrize("value", [None, True, -3, 0.1, "half", "it's", [1, 2], {"a": 1}])
def test_a_short_value_is_its_text(value: object) -> None:
    assert quoted(value) == repr(value)


def test_a_long_message_keeps_its_remedy() -> None:
    message = str(GispError(f"data {'x' * 100000} does not exist: give another"))
    assert message.startswith("data xxx") and message.endswith("give another") and len(message) < 1100


def allocate_torch() -> None:
    torch.empty(10**15)


def allocate_numpy() -> None:
    np.empty(10**15)


def fail(error: Exception) -> None:
    raise error


OUT_OF_MEMORY = {
    "torch": allocate_torch,
    "numpy": allocate_numpy,
    "python": lambda: fail(MemoryError()),
    "cuda": lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")),
    "cublas": lambda: fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
    "system": lambda: fail(OSError(errno.ENOMEM, "Cannot allocate memory")),
    "mapping": lambda: fail(RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)")),
}


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
@pytest.mark.parametrize("command", ["prune", "eval", "inspect"])
def test_out_of_memory_is_one_line_everywhere(name, command, monkeypatch, capsys, tmp_path, model_folder, token_file):
    def run_out(*_: object, **__: object) -> None:
        OUT_OF_MEMORY[name]()

    arguments = {
        "prune": [str(model_folder), "--data", str(token_file), "--out", str(tmp_path / "r"), "--device", "cpu"],
        "eval": [str(model_folder), "--data", str(token_file), "--device", "cpu"],
        "inspect": [str(tmp_path)],
    }
    place = {
        "prune": "gisp.run.loop.PruningLoop.run",
        "eval": "transformers.AutoModelForCausalLM.from_pretrained",
        "inspect": "gisp.run.record.read_trajectory",
    }
    monkeypatch.setattr(place[command], run_out)
    options = ["--sparsity", "0.2", "--steps", "2"] if command == "prune" else []
    assert main([command, *arguments[command], *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory: ") and error.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ENOSPC, "No space left"), KeyError("memory")])
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)
