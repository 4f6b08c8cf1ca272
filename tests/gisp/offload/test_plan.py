"""Plans: what fits stays on the device, what does not is told before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from gisp.config.memory import bytes_of, gigabytes
from gisp.errors import GispError
from gisp.offload.plan import Demand, Plan, make_plan

GB = 10**9
# Ten layers of 1 GB.
DEMAND = Demand(layers=(GB,) * 10, rest=GB, largest=GB // 5, inputs=GB // 10, working=GB)


def planned(limit: float | None, demand: Demand = DEMAND, *, everything: bool = False, host: int = 1000) -> Plan | None:
    size = None if limit is None else int(limit * GB)
    return make_plan(demand, everything=everything, limit=size, host=host * GB)


def test_what_fits_stays() -> None:
    # 1 + 10 layers + 10 inputs + 1, and what is left free.
    assert planned(13 / 0.92 + 0.01) is None
    assert planned(None) is None
    plan = planned(13 / 0.92 - 0.01)
    assert plan is not None and 0 < len(plan.streamed) < 10


def test_more_memory_holds_more_layers_and_never_more_than_there_is() -> None:
    counts = []
    for limit in (6, 7, 8, 9, 10, 11, 12, 13):
        plan = planned(limit)
        assert plan is not None and plan.device <= 0.92 * limit * GB
        counts.append(len(plan.streamed))
        gaps = [after - before for before, after in pairwise(plan.streamed)]
        assert max(gaps) - min(gaps) <= 1 or len(plan.streamed) > 5
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0]


def test_always_means_all_layers() -> None:
    for limit in (7, 1000, None):
        plan = planned(limit, everything=True)
        assert plan is not None and plan.streamed == tuple(range(10)) and not plan.inputs_on_host
        assert plan.host == 10 * GB


def test_inputs_move_to_the_host_only_where_they_must() -> None:
    large = replace(DEMAND, inputs=GB)
    assert not planned(30, large, everything=True).inputs_on_host  # type: ignore[union-attr]
    plan = planned(9, large, everything=True)
    assert plan is not None and plan.inputs_on_host and plan.host == 20 * GB
    assert "inputs of layers in host memory (10.0 GB)" in plan.lines()[1]


def test_lines_say_what_lies_where() -> None:
    plan = planned(9)
    assert plan is not None
    first, second = plan.lines()
    streamed = len(plan.streamed)
    assert first == (
        f"offload: {streamed} of 10 layers in host memory ({streamed}.0 GB), {10 - streamed} on the device "
        f"({10 - streamed}.0 GB)"
    )
    assert f"device peak {gigabytes(plan.device)} of 9.0 GB, host {streamed}.0 GB" in second


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(GispError, match=r"--offload needs 4.9 GB on the GPU .*, 4.0 GB may be used: give a smaller"):
        planned(4)
    with pytest.raises(GispError, match=r"needs 10.0 GB of host memory, 9.0 GB are free"):
        planned(None, everything=True, host=9)
    with pytest.raises(GispError, match=r"needs 12.0 GB of host memory"):
        planned(None, replace(DEMAND, loading=12 * GB), everything=True, host=11)
    assert make_plan(DEMAND, everything=True, limit=None, host=None) is not None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * GB),
        ("24 gb", 24 * GB),
        ("7.5", 7.5 * GB),
        ("24GiB", 24 * 2**30),
        ("500MB", 5 * 10**8),
        ("0.3m", 300000),
        ("0", None),
        ("", None),
        ("GB", None),
        ("-3GB", None),
        ("24TB", None),
        ("1e9", None),
    ],
)
def test_amounts(text: str, size: float | None) -> None:
    assert bytes_of(text) == size
