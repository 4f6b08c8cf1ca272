"""Shapes of real models on the way to one half."""

from __future__ import annotations

from benchmarks.common.registry import DENSE, HALF, MIDWAY, REAL, cases, odd_cases, quick_cases


def test_registry_shapes() -> None:
    shapes = {(c.projection, c.rows, c.width) for c in cases("llama-2-13b")}
    assert shapes == {("qkv", 5120, 5120), ("o", 5120, 5120), ("gate/up", 13824, 5120), ("down", 5120, 13824)}
    assert {c.projection for c in cases("llama-3-8b")} == {"q", "o", "gate/up", "down"}
    every = [case for kept in (DENSE, MIDWAY, HALF) for name in REAL for case in cases(name, kept)]
    assert set(quick_cases()) <= set(every)
    for case in every:
        extent = case.rows if case.axis == "row" else case.width
        assert extent % case.block == 0
        assert case.rows % 16 == 0 and case.width % 16 == 0
    assert cases("llama-2-13b", 0.52)[2].rows < 0.53 * 13824
    assert {c.rows % 16 or c.width % 16 for c in odd_cases()} == {0, 13817 % 16}
