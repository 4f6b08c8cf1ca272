"""Timing on a GPU: cold second-level cache, device time by events, memory above what the inputs hold."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

L2_MULTIPLE = 3
TARGET_SECONDS = 0.1
ROUNDS = 5
# The GPU waits while the host enqueues, so that launches are not timed; twice what that took is granted, at 2 GHz.
HEAD_START_CYCLES = 20_000_000
CYCLES_PER_SECOND = 2e9

Inputs = tuple[torch.Tensor, ...]
Prepare = Callable[[], object]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Measurement:
    """Repetitions in milliseconds, as of :func:`summarised`, and peak extra memory in bytes."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    min_ms: float
    max_ms: float
    repetitions: int
    extra_bytes: int


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def summarised(milliseconds: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, fastest and slowest repetition, and how many there were."""
    first, third = quartiles(milliseconds)
    return {
        "median_ms": statistics.median(milliseconds),
        "q1_ms": first,
        "q3_ms": third,
        "min_ms": min(milliseconds),
        "max_ms": max(milliseconds),
        "repetitions": len(milliseconds),
    }


def cache_bytes(device: torch.device) -> int:
    """Bytes of the second-level cache of a GPU."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def rotation(inputs: Inputs) -> list[Inputs]:
    """Copies of ``inputs`` that together exceed the second-level cache several times, at least two."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    copies = min(32, max(2, -(-L2_MULTIPLE * cache_bytes(inputs[0].device) // max(size, 1))))
    return [inputs, *(tuple(tensor.clone() for tensor in inputs) for _ in range(copies - 1))]


def restorer(inputs: Inputs) -> Prepare:
    """What brings inputs that are overwritten back to their present values, and empties the cache of them."""
    originals = tuple(tensor.clone() for tensor in inputs)
    flush = torch.empty(L2_MULTIPLE * cache_bytes(inputs[0].device), dtype=torch.int8, device=inputs[0].device)

    def restore() -> None:
        for tensor, original in zip(inputs, originals, strict=True):
            tensor.copy_(original)
        flush.zero_()

    return restore


def measure(function: Function, inputs: Inputs, copies: Sequence[Inputs] | None = None) -> Measurement:
    """:func:`measure_together` of one function."""
    return measure_together({"": function}, inputs, copies)[""]


def measure_together(
    functions: Mapping[str, Function],
    inputs: Inputs,
    copies: Sequence[Inputs] | None = None,
    *,
    prepare: Prepare | None = None,
) -> dict[str, Measurement]:
    """Device time of every ``function(*inputs)`` with none of its inputs in the cache.

    The functions take turns, :data:`ROUNDS` times: a GPU at its power limit changes its clock from second to second, by
    more than what tells some of them apart.

    Args:
        functions: what to time; results are dropped.
        inputs: tensors they take.
        copies: the rotation of inputs to call them on, if already made.
        prepare: enqueued before every call and not timed, for functions that overwrite their inputs (see
            :func:`restorer`); they then always get ``inputs``.
    """
    copies = [inputs] if prepare else copies or rotation(inputs)
    before_call = prepare or _nothing
    extra, turns, times = {}, {}, {}
    for name, function in functions.items():
        extra[name] = _warm_up(function, inputs, copies, before_call)
        probe = _times(function, copies, before_call, 3)
        repetitions = min(50, max(7, TARGET_SECONDS * 1000 / max(statistics.median(probe), 1e-3)))
        cycles = int(2 * _host_seconds(function, copies, before_call) * CYCLES_PER_SECOND)
        turns[name] = math.ceil(repetitions / ROUNDS), cycles
        times[name] = list[float]()
    for _ in range(ROUNDS):
        for name, function in functions.items():
            times[name] += _times(function, copies, before_call, *turns[name])
    return {name: Measurement(**summarised(found), extra_bytes=extra[name]) for name, found in times.items()}


def _warm_up(function: Function, inputs: Inputs, copies: Sequence[Inputs], prepare: Prepare) -> int:
    """Peak bytes a call takes above its inputs, once everything is compiled."""
    for copy in (*copies[:2], inputs):
        prepare()
        function(*copy)
    prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _nothing() -> None:
    pass


def _host_seconds(function: Function, copies: Sequence[Inputs], prepare: Prepare) -> float:
    """Host time to enqueue one call."""
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    start = time.perf_counter()
    for number in range(3):
        prepare()
        function(*copies[number % len(copies)])
    seconds = (time.perf_counter() - start) / 3
    torch.cuda.synchronize()
    return seconds


def _times(
    function: Function,
    copies: Sequence[Inputs],
    prepare: Prepare,
    repetitions: int,
    cycles_each: int = 0,
) -> list[float]:
    marks = [(_event(), _event()) for _ in range(repetitions)]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES + cycles_each * repetitions)
    for number, (start, stop) in enumerate(marks):
        prepare()
        start.record()
        function(*copies[number % len(copies)])
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in marks]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches in this run: bfloat16 matrix product and copy."""

    matmul_tflops: float
    copy_gbs: float


def ceilings() -> Ceilings:
    """Measure an 8192^3 bfloat16 product and the copy of 2 GiB (bytes read plus written)."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = measure(torch.mm, (a, b))
    source = torch.empty(2**30, device="cuda", dtype=torch.bfloat16).fill_(1)
    target = torch.empty_like(source)
    copy = measure(lambda s, t: t.copy_(s), (source, target), [(source, target)])
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(2 * n**3 / product.median_ms / 1e9, moved / copy.median_ms / 1e6)
