"""Memory of mapped files goes back; what was written, and what no file backs, stays."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gisp.mapped import give_back

SIZE = 2**22

pytestmark = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="this system has no page map")


def resident(tensor: torch.Tensor) -> int:
    """Bytes in memory of the mapping that a tensor lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= tensor.data_ptr() < int(bounds[2], 16)
        elif inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("not mapped")


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    """float32 [SIZE / 4] in a file, all of it read."""
    values = torch.arange(SIZE // 4, dtype=torch.float32)
    save_file({"a": values}, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")["a"]
    assert torch.equal(found, values)
    return found


def test_what_was_read_goes_and_comes_again(mapped: torch.Tensor) -> None:
    assert resident(mapped) >= SIZE
    give_back(mapped)
    assert resident(mapped) <= 2**16
    assert torch.equal(mapped, torch.arange(SIZE // 4, dtype=torch.float32))


def test_what_was_written_stays(mapped: torch.Tensor) -> None:
    mapped[SIZE // 8] = -1
    # A write may let pages beside it go.
    float(mapped.sum())
    give_back(mapped)
    assert float(mapped[SIZE // 8]) == -1
    assert resident(mapped) >= SIZE


def test_a_part_of_a_file_leaves_its_neighbours_alone(mapped: torch.Tensor) -> None:
    first, second = mapped[: SIZE // 8], mapped[SIZE // 8 :]
    second[0] = -1
    float(mapped.sum())
    give_back(first)
    assert SIZE // 2 <= resident(mapped) <= SIZE // 2 + 2**16
    assert float(second[0]) == -1 and torch.equal(first, torch.arange(SIZE // 8, dtype=torch.float32))


def test_memory_that_no_file_backs_is_left_alone(mapped: torch.Tensor) -> None:
    for tensor in (
        torch.ones(SIZE),
        torch.ones(8),
        torch.ones(0),
        mapped.view(-1, 1024).T,
        torch.ones(4, device="meta"),
    ):
        before = None if tensor.is_meta else tensor.clone()
        give_back(tensor)
        assert before is None or torch.equal(tensor, before)
    assert resident(mapped) >= SIZE
