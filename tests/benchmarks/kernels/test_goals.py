"""Goals of the kernels."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.common.goals import goal_table
from benchmarks.common.task import AUTO, COMPILED
from benchmarks.kernels.goals import kernel_goals


def score_rows(tokens: int, **milliseconds: float) -> list[dict[str, Any]]:
    where = {"op": "wgrad_importance", "model": "llama-3-8b", "projection": "q", "rows": 64, "width": 32, "kept": 1.0}
    names = {"auto": AUTO, "eager": "cublas + eager", "ours": "cublas + ours", "alone": "cublas alone"}
    return [{**where, "tokens": tokens, "implementation": names[n], "median_ms": ms} for n, ms in milliseconds.items()]


def test_kernel_goals_take_the_worst_shape() -> None:
    rows = score_rows(512, auto=1.0, eager=3.0, ours=1.2, alone=0.8)
    rows += [{**row, "projection": "o"} for row in score_rows(512, auto=1.0, eager=2.0, ours=1.4)]
    # Odd widths and models of no goal do not count.
    rows += [{**row, "rows": 63} for row in score_rows(512, auto=9.0, eager=1.0)]
    rows += [{**row, "model": "tiny"} for row in score_rows(512, auto=9.0, eager=1.0)]
    rows += score_rows(8192, auto=1.0, eager=1.5, alone=0.95)
    rows.append({"op": "partition_step", "model": "llama-2-13b", "implementation": AUTO, "median_ms": 3.0})
    rows[-1]["extra_bytes"] = 2**19
    goals = {goal.what: goal for goal in kernel_goals(rows)}
    eager = goals["scores, 512 tokens, over cublas + eager"]
    assert eager.worst == 2.0 and eager.median == 2.5 and eager.met is False and "llama-3-8b o" in eager.where
    assert eager.margin == pytest.approx((2.0 - 2.2) / 2.2)
    assert goals["scores, 512 tokens, over cublas + ours"].worst == 1.2
    assert goals["scores, 8192 tokens, speed of cublas alone"].met is True
    assert goals["scores, 2048 tokens, over cublas + eager"].met is None
    partition = goals["partition of the 13B, wall"]
    assert partition.met is False and partition.margin == pytest.approx(-0.5)
    assert goals["partition of the 13B, extra memory"].worst == 0.5
    table = goal_table(goals.values())
    assert "MISSED by 9 %" in table and "not measured" in table and "MISSED by 50 %" in table


def test_goals_of_gate_gradients_and_layers() -> None:
    gate = {"op": "gate_grads", "model": "llama-3-8b", "projection": "o", "width": 64}
    rows = [
        {**gate, "tokens": tokens, "kept": kept, "implementation": name, "median_ms": ms, "percent_of_copy": 90.0 / ms}
        for tokens, kept, times in ((2048, 1.0, (1, 1.3)), (2048, 0.52, (1, 1.05)), (8192, 1.0, (1, 1.2)))
        for name, ms in zip((AUTO, COMPILED), times, strict=True)
    ]
    layer = {"op": "layer_reduce", "model": "llama-3-8b", "projection": "layer", "implementation": AUTO}
    rows += [{**layer, "kept": kept, "median_ms": 1.0, "percent_of_copy": 80 + 10 * kept} for kept in (1.0, 0.5)]
    goals = {goal.what: goal for goal in kernel_goals(rows)}
    few = goals["gate gradients, 2048 tokens, over torch.compile"]
    assert few.worst == 1.05 and few.met is False and "52% kept" in few.where
    assert goals["gate gradients, 8192 tokens, over torch.compile"].met is True
    assert goals["gate gradients, 8192 tokens, of copy"].worst == 90.0
    assert goals["reduction of a layer at once, of copy"].worst == 85.0
