"""Tables and verdicts of the study."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.quality import summary
from benchmarks.quality.cells import Cell


def test_means_spreads_and_verdicts() -> None:
    def cell(name: str, seed: int, value: float, extra: tuple[float, ...] = ()) -> dict[str, Any]:
        points: list[dict[str, Any]] = [
            {"asked": 0.5, "compensation": None, "perplexity": value, "tokens": 10, "seconds": 1.0}
        ]
        points += [{**points[0], "compensation": {"method": "lsq"}, "perplexity": other} for other in extra]
        return {**Cell("criteria", name, {}, seed).to_dict(), "points": points}

    result: dict[str, Any] = {
        "dense": {"perplexity": 5.0},
        "cells": [cell("fast", 0, 10.0, (7.0,)), cell("fast", 1, 12.0, (8.0,)), cell("flap", 0, 20.0)],
    }
    shown = summary.show(result, "criteria")
    assert "11.00 (2.00)" in shown and shown.index("fast + lsq") < shown.index("11.00") < shown.index("flap")
    assert summary.verdicts(result) == [
        "50 %: fast is number 1 of 2 (11.00); best of the others: flap (20.00)",
        "50 %: fast + lsq removes 58 % of the excess perplexity (11.00 to 7.50, dense 5.00)",
    ]
    exact = cell("paper, 112 steps", 0, 13.0)
    exact["points"][0]["tokens"] = 200
    result["cells"].append(exact)
    assert "50 %: fast 11.00 on 10 tokens, paper, 112 steps 13.00 on 200 (5.0 % of them)" in summary.verdicts(result)


def test_the_lead_kept_is_of_means_over_choice_tasks() -> None:
    dense = {"chance a": 0.25, "acc a": 0.75, "chance b": 0.5, "acc b": 0.5, "chance g": 0.0, "acc g": 0.4}
    assert summary.lead_kept(dense, {"acc a": 0.5, "acc b": 0.5, "acc g": 0.0}) == pytest.approx(0.5)
    assert summary.lead_kept(dense, {"perplexity": 3.0}) is None
    assert summary.lead_kept({"chance a": 0.5, "acc a": 0.4}, {"acc a": 0.6}) is None
