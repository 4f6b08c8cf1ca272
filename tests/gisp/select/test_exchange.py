"""Which structures come back for others, and the steps removals count as made at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_model

from gisp.model.structures import map_model
from gisp.select.exchange import resequenced, returning
from gisp.select.selector import Selector


def selector(removed: dict[str, list[int]], align: int = 1) -> Selector:
    """Of four layers of 4 heads and 24 channels; layer 0 is protected.

    Args:
        removed: what is gone, by ``LAYER.heads`` or ``LAYER.channels``.
    """
    made = Selector(
        map_model(tiny_model("llama-mha")), norm="params", protected=frozenset({0}), align=align, keep_minimum=True
    )
    made.apply(*made.given({f"layers.{name}": torch.tensor(index) for name, index in removed.items()}))
    return made


HEAD, CHANNEL = 4 * 8 * 32, 3 * 32
FIRST = 16  # Number of the first channel.


def worth_of(**values: float) -> np.ndarray:
    """1 a parameter for everything, but what is given by number, in worth a parameter."""
    worth = np.concatenate([np.full(16, float(HEAD)), np.full(96, float(CHANNEL))])
    for number, value in values.items():
        worth[int(number[1:])] *= value
    return worth


def test_what_is_worth_more_a_parameter_comes_back() -> None:
    made = selector({"1.heads": [2], "2.channels": [0, 5, 7]})
    channel = FIRST + 2 * 24
    worth = worth_of(**{"s6": 1.5, f"s{channel}": 0.9, f"s{channel + 5}": 3, f"s{channel + 7}": 2})
    back = returning(made, worth, 10**6)
    assert np.flatnonzero(back).tolist() == [6, channel + 5, channel + 7]


def test_the_budget_ends_it() -> None:
    made = selector({"1.heads": [2], "2.channels": [0, 5, 7]})
    channel = FIRST + 2 * 24
    worth = worth_of(**{"s6": 1.5, f"s{channel}": 1.2, f"s{channel + 5}": 3, f"s{channel + 7}": 2})
    for budget, expected in (
        (CHANNEL - 1, []),
        (CHANNEL, [channel + 5]),
        (2 * CHANNEL + HEAD - 1, [channel + 5, channel + 7]),
        (2 * CHANNEL + HEAD, [6, channel + 5, channel + 7]),
    ):
        assert np.flatnonzero(returning(made, worth, budget)).tolist() == expected


def test_what_would_go_for_it_must_be_worth_less() -> None:
    made = selector({"2.channels": [0, 5]})
    channel = FIRST + 2 * 24
    # One present channel is worth 0.1, everything else 1: the second to come back would push out what is worth more.
    worth = worth_of(**{f"s{channel}": 0.8, f"s{channel + 5}": 0.9, f"s{channel + 1}": 0.1})
    assert np.flatnonzero(returning(made, worth, 10**6)).tolist() == [channel + 5]


def test_protected_groups_push_nothing_out() -> None:
    made = selector({"2.channels": [0]})
    worth = worth_of(**{f"s{FIRST + 2 * 24}": 0.9, f"s{FIRST}": -1, "s0": -1})
    assert not returning(made, worth, 10**6).any()


def test_widths_grow_by_whole_multiples() -> None:
    made = selector({"2.channels": list(range(8)), "3.channels": list(range(4))}, align=4)
    second, third = FIRST + 2 * 24, FIRST + 3 * 24
    high = {f"s{second + i}": 5.0 - i / 10 for i in range(6)} | {f"s{third + i}": 4.0 for i in range(3)}
    back = np.flatnonzero(returning(made, worth_of(**high, **{f"s{third + 3}": 0.5}), 10**6)).tolist()
    # Two of the six are left over, and the fourth of the other layer is not worth it.
    assert back == [second, second + 1, second + 2, second + 3]


def test_restored_removals_count_as_the_only_ones() -> None:
    made, other = selector({"1.heads": [2], "2.channels": [0, 5, 7]}), selector({"2.channels": [5, 9]})
    made.restore({"layers.2.channels": torch.tensor([5, 9])})
    assert np.array_equal(made.removed, other.removed)
    assert made.removed_parameters == other.removed_parameters == 2 * CHANNEL
    scores = torch.rand(112, generator=torch.Generator().manual_seed(0))
    for target in (2000, 9000):
        chosen = [s.within_target(s.rank(scores), target) for s in (made, other)]
        assert torch.equal(chosen[0].removed, chosen[1].removed)


@pytest.mark.parametrize("multiple", [1, 4, 5])
@pytest.mark.parametrize("size", [24, 22])
def test_widths_are_multiples_after_every_step(size: int, multiple: int) -> None:
    generator = np.random.default_rng(size * multiple)
    kept = 2 * multiple
    at = np.zeros(size, dtype=np.int32)
    gone = generator.permutation(size)[: size - kept]
    at[gone] = generator.integers(1, 6, len(gone))
    found = resequenced(at, multiple)
    assert np.array_equal(found > 0, at > 0)
    assert found.max() <= 5
    for step in range(1, 6):
        width = size - np.count_nonzero((found > 0) & (found <= step))
        wanted = size - np.count_nonzero((at > 0) & (at <= step))
        assert width == size or width % multiple == 0
        assert wanted <= width < wanted + multiple
    # Nothing overtakes: what went earlier still goes no later.
    order = np.argsort(at[gone], kind="stable")
    if multiple == 1:
        assert np.array_equal(found, at)
    assert (np.diff(found[gone][order])[np.diff(at[gone][order]) > 0] >= 0).all()
