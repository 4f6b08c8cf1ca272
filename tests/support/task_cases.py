"""What tests of benchmark tasks share: ceilings, and which implementations pass a task's check on a CPU."""

from __future__ import annotations

from benchmarks.common.measure import Ceilings
from benchmarks.common.task import COMPILED, Prepared, checked

PEAK = Ceilings(matmul_tflops=800.0, copy_gbs=4000.0)


def right_ones(prepared: Prepared) -> list[str]:
    """Names of the implementations, all right; compiled ones are left out, a compiler is not at hand everywhere."""
    prepared.implementations.pop(COMPILED, None)
    prepared.implementations.pop("cublas + compiled", None)
    right, wrong = checked(prepared)
    assert not wrong, wrong
    return list(right)
