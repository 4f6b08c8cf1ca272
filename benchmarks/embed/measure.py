"""Checks that ways agree, then times them in turns: wall time of a pass until the device is done, and memory."""

from __future__ import annotations

import math
import time

import torch

from benchmarks.common.measure import ROUNDS, summarised
from benchmarks.common.task import Row, first_line
from benchmarks.embed.peers import PEERS
from benchmarks.embed.subject import Subject
from benchmarks.embed.ways import PASS, WAYS, Scores, Step, Way

# Relative distance of two ways' scores. Rounding of 16-bit gradients that went through other kernels accounts for less.
TOLERANCE = {torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps, torch.float32: 1e-4}


def measure_ways(subject: Subject, repetitions: int) -> list[Row]:
    """A row for every way that is installed; one whose scores are wrong has ``red``, the reason, and no time."""
    ways: dict[str, tuple[Way, str | None]] = {**WAYS, **PEERS}
    found: dict[str, Scores] = {}
    red: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    for name, (way, baseline) in ways.items():
        before = _allocated(subject.device)
        try:
            with way(subject) as step:
                found[name] = step()
                if baseline is not None:
                    _check(found[name], found[baseline], TOLERANCE[next(subject.decoder.parameters()).dtype])
                peaks[name] = _peak(step, subject.device, before)
        except Exception as error:  # peers raise what they like; any of it takes a way out of the comparison
            red[name] = first_line(error)
    found.clear()
    times = _times({name: way for name, (way, _) in ways.items() if name not in red}, subject, repetitions)
    floor = peaks.get(PASS)
    rows: list[Row] = [{"way": name, "red": reason} for name, reason in red.items()]
    for name, taken in times.items():
        row: Row = {"way": name, **summarised(taken), "extra_bytes": None}
        peak, baseline = peaks[name], ways[name][1]
        if floor is not None and peak is not None:
            row["extra_bytes"] = peak - floor
        if baseline is not None and baseline in times:
            reference = summarised(times[baseline])["median_ms"]
            row |= {"baseline": baseline, "speedup": reference / row["median_ms"]}
        rows.append(row)
    return rows


def _check(scores: Scores, expected: Scores, tolerance: float) -> None:
    """Raise AssertionError where scores of a group are not those expected; a way may score fewer groups."""
    assert scores and set(scores) <= set(expected), f"scored {sorted(scores)[:3]}, not {sorted(expected)[:3]}"
    for name, values in scores.items():
        distance = float((values - expected[name]).norm() / expected[name].norm().clamp_min(1e-30))
        assert distance <= tolerance, f"{name} is off by {distance:.3g} relative, allowed {tolerance:.3g}"


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(step: Step, device: torch.device, before: int) -> int | None:
    """Most bytes a step takes above those ``before`` the way began; ``None`` on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _times(ways: dict[str, Way], subject: Subject, repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of every repetition."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            with way(subject) as step:
                step()
                times[name] += [_wall(step, subject.device) for _ in range(math.ceil(repetitions / ROUNDS))]
    return times


def _wall(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)
