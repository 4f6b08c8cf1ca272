"""Plans: what fits stays on the device, what does not is told before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gisp.config.memory import bytes_of, gigabytes
from gisp.config.options import make_config
from gisp.data import Sequences
from gisp.errors import GispError
from gisp.model.structures import map_model
from gisp.offload.plan import Demand, Plan, make_plan
from gisp.run.resources import placement

GB = 10**9
# Ten layers of 1 GB.
DEMAND = Demand(layers=(GB,) * 10, rest=GB, largest=GB // 5, inputs=GB // 10, working=GB)


def planned(limit: float | None, demand: Demand = DEMAND, *, everything: bool = False, host: int = 1000) -> Plan | None:
    size = None if limit is None else int(limit * GB)
    return make_plan(demand, everything=everything, limit=size, host=host * GB)


def test_what_fits_stays() -> None:
    # 1 + 10 layers + 10 inputs + 1, and what is left free.
    assert planned(13.06 / 0.92) is None
    assert planned(None) is None
    plan = planned(13 / 0.92 - 0.01)
    # Inputs cross twice, as much as one layer; with a layer in host memory two slots would be taken.
    assert plan is not None and plan.inputs_on_host and not plan.streamed
    plan = planned(12 / 0.92)
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


def test_embedding_and_projection_move_where_less_crosses_the_bus() -> None:
    # Of the rest of 3 GB the projection takes the place of a layer that visits.
    ends = replace(DEMAND, rest=3 * GB, embedding=GB, head=GB)
    plan = planned(9, ends)
    assert plan is not None and plan.ends_on_host
    kept = planned(9, replace(ends, embedding=0, head=0))
    assert kept is not None and not kept.ends_on_host and kept.crossing > plan.crossing
    assert len(plan.streamed) == len(kept.streamed) - 2 and plan.host == (len(plan.streamed) + 2) * GB
    assert plan.lines()[1].endswith(", embedding and output projection in host memory (2.0 GB)")
    # What fits is not moved, also where all layers are.
    assert not planned(9, ends, everything=True).ends_on_host  # type: ignore[union-attr]
    assert planned(6, ends, everything=True).ends_on_host  # type: ignore[union-attr]
    with pytest.raises(GispError, match=r"--offload needs 4.9 GB on the GPU for two layers"):
        planned(4, ends)
    # A projection larger than layers makes both slots larger.
    wide = Plan(replace(DEMAND, rest=4 * GB, head=3 * GB), (0,), False, None, ends_on_host=True)
    assert wide.device - replace(wide, ends_on_host=False).device == 2 * 2 * GB - 3 * GB


def test_lines_say_what_lies_where() -> None:
    plan = planned(9)
    assert plan is not None
    first, second, third = plan.lines()
    streamed = len(plan.streamed)
    assert first == (
        f"offload: {streamed} of 10 layers in host memory ({streamed}.0 GB), {10 - streamed} on the device "
        f"({10 - streamed}.0 GB)"
    )
    assert second == "  inputs of layers on the device (1.0 GB)"
    assert third == f"  device peak {gigabytes(plan.device)} of 9.0 GB, host {streamed}.0 GB"


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(GispError, match=r"--offload needs 4.9 GB on the GPU .*, 4.0 GB may be used: give a smaller"):
        planned(4)
    with pytest.raises(GispError, match=r"needs 10.0 GB of host memory, 9.0 GB are free"):
        planned(None, everything=True, host=9)
    with pytest.raises(GispError, match=r"needs 12.0 GB of host memory"):
        planned(None, replace(DEMAND, loading=12 * GB), everything=True, host=11)
    assert make_plan(DEMAND, everything=True, limit=None, host=None) is not None


SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    "Llama-2-13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "vocab_size": 32000},
    "Llama-3-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256},
}


def model_demand(name: str) -> Demand:
    """What preset fast asks of memory for a model of that name, a GPU's tokens a pass."""
    shape = SHAPES[name]
    heads = shape["hidden_size"] // 128
    config = LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=8 if "-3-" in name else heads)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    rows = torch.zeros(2000, 256, dtype=torch.int64)
    return placement.demand(map_model(model), Sequences.plain([(row, row) for row in rows]), make_config())


@pytest.mark.parametrize("name", SHAPES)
def test_documented_plans_are_those_that_are_made(name: str) -> None:
    page = (Path(__file__).parents[3] / "docs" / "offload.md").read_text(encoding="utf-8")
    found = re.findall(rf"{name} \| one of (\d+) GB \| (\d+) of \d+ layers in host memory \| (\S+) \| (\S+) \|", page)
    assert found
    asked = model_demand(name)
    for limit, layers, device, host in found:
        plan = planned(float(limit), asked)
        assert plan is not None and plan.ends_on_host
        said = str(len(plan.streamed)), gigabytes(plan.device), gigabytes(plan.host)
        assert said == (layers, f"{device} GB", f"{host} GB")
        if (name, limit) == ("Llama-3-70B", "80"):
            assert "\n".join(plan.lines()) in page


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
