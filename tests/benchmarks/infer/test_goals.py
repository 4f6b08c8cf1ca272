"""Goals of inference."""

from __future__ import annotations

from typing import Any

from benchmarks.infer.goals import infer_goals


def test_goals_are_about_one_half() -> None:
    def row(asked: float, milliseconds: float, size: int) -> dict[str, Any]:
        return {"asked": asked, "prefill_ms": milliseconds, "decode_ms": {"1": milliseconds}, "weight_bytes": size}

    goals = infer_goals([{"model": "llama-2-13b", "rows": [row(0.0, 10, 100), row(0.5, 6, 52)]}])
    assert [goal.met for goal in goals] == [False, True, True]
    assert [goal.met for goal in infer_goals([])] == [None] * 3
