"""Goals of a whole run."""

from __future__ import annotations

from benchmarks.common.goals import Goal
from benchmarks.prune.goals import prune_goals


def test_run_goals_need_the_full_run() -> None:
    run = {"model": "llama-2-13b", "full": True, "seconds": 160.0, "peak_bytes": 59e9, "percent_of_matmul_dense": 76.0}
    goals = {goal.what: goal for goal in prune_goals([run])}
    assert goals["13B to 50 %, whole loop"].met is True
    assert goals["13B to 50 %, whole loop (aim)"].met is False
    assert goals["13B to 50 %, peak memory"].met is True
    assert goals["13B importance pass, at the end, of matmul"].met is None
    assert all(goal.met is None for goal in prune_goals([{**run, "full": False}]))
    assert Goal("x", 2, "ms", 2.0, at_least=False).met is True
