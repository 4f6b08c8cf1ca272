"""Planning on the host: a step of a small model must not wait until many threads are awake."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gisp_kernels.ordering import Ordering


class Threads(TorchDispatchMode):
    """Notes how many threads every operation may take."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(torch.get_num_threads())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def many_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield 8
    torch.set_num_threads(before)


def test_a_plan_takes_one_thread_and_leaves_the_others_as_they_were(many_threads: int) -> None:
    ordering = Ordering({"a": 40, "b": 40})
    with Threads() as threads:
        change = ordering.plan({"a": [3, 5], "b": [0]})
        ordering.within_groups(change)
        ordering.swap(change)
    assert len(threads.seen) > 10 and set(threads.seen) == {1}
    assert torch.get_num_threads() == many_threads


def test_a_refused_plan_leaves_the_threads_as_they_were(many_threads: int) -> None:
    with pytest.raises(ValueError, match="has 40 structures, got index 40"):
        Ordering({"a": 40}).plan({"a": [40]})
    assert torch.get_num_threads() == many_threads
