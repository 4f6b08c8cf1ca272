"""Sums and messages of several processes: the same bits whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import distributed

from gisp.errors import GispError
from gisp.replicas import group
from gisp.replicas.agreement import agree, code_digest
from gisp.replicas.group import Replicas

SLICES = 8


def values(number: int) -> torch.Tensor:
    """Numbers of very different sizes, whose sum depends on the order."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1000, dtype=torch.float64, generator=generator) * 10.0 ** (5 * (number % 5))


def in_order(numbers: range) -> torch.Tensor:
    total = values(numbers[0])
    for number in numbers[1:]:
        total = total + values(number)
    return total


def check_sums_in_place(replicas: Replicas) -> None:
    """Tensors of several shapes, longer than what travels at a time; the last round of slices may be half empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "_ELEMENTS", 300)
        totals = [torch.zeros(10, 100, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]

        def fill(number: int, sums: Sequence[torch.Tensor]) -> None:
            sums[0].add_(values(number).view(10, 100))
            sums[1].add_(number)

        replicas.add_up(totals, SLICES, fill)
        assert torch.equal(totals[0].flatten(), in_order(range(SLICES)))
        assert totals[1].item() == sum(range(SLICES))


def sums_and_messages(folder: str) -> None:
    replicas = Replicas(distributed.group.WORLD)
    asked: list[int] = []

    def sums_of(number: int) -> torch.Tensor:
        asked.append(number)
        return values(number)

    assert torch.equal(replicas.total(SLICES, sums_of), in_order(range(SLICES)))
    assert all(map(torch.equal, replicas.parts(SLICES, values), map(values, range(SLICES))))
    check_sums_in_place(replicas)
    letters = [str(number) * number for number in range(7)]
    told: list[str] = []
    found = replicas.each(letters, lambda letter: [letter, len(letter) / 3], told.append)
    assert found == [[letter, len(letter) / 3] for letter in letters]
    assert told == letters
    assert [letters[number] for number in replicas.share(7)] == letters[replicas.rank :: replicas.size]
    shares = [[int(i) for i in text.split()] for text in replicas.exchange(" ".join(map(str, asked)).encode())]
    assert sorted(i for share in shares for i in share) == list(range(SLICES))
    assert max(map(len, shares)) == -(-SLICES // replicas.size)
    # Messages of several lengths, none among them.
    mine = b"x" * (5 * replicas.rank)
    assert replicas.exchange(mine) == [b"x" * (5 * rank) for rank in range(replicas.size)]
    assert replicas.from_first(b"rank %d" % replicas.rank) == b"rank 0"
    assert replicas.first == (replicas.rank == 0)
    agree(replicas, {"data": "a"})
    digest = ("1" if replicas.rank == 1 else "0") * 64
    with pytest.raises(GispError, match="rank 1 has data 111111111111, rank 0 has 000000000000: start all"):
        agree(replicas, {"code": code_digest(), "data": digest})
    with pytest.raises(GispError, match="rank 1 has option steps None, rank 0 has 3"):
        agree(replicas, {} if replicas.rank == 1 else {"option steps": 3})
    Path(folder, f"done-{replicas.rank}").touch()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_and_messages(size: int, tmp_path: Path) -> None:
    run_ranks(size, tmp_path / "ranks", sums_and_messages, str(tmp_path))
    assert len(list(tmp_path.glob("done-*"))) == size


def test_one_process_adds_in_the_same_order() -> None:
    assert torch.equal(Replicas().total(SLICES, values), in_order(range(SLICES)))
    # The order is seen in the bits: what sums otherwise fails these tests.
    assert not torch.equal(in_order(range(SLICES)), in_order(range(SLICES)[::-1]))
    check_sums_in_place(Replicas())
    assert Replicas().exchange(b"alone") == [b"alone"]
