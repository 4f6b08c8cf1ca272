"""What a step reports beside its result: seconds per phase, peak memory, the distribution of scores."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import torch

from gisp import progress
from gisp.select.selector import Ranking

_BINS = 40
PHASES = ("forward_backward", "select", "compact", "write")
# By device the events of steps that are over: a new one takes the host as long as ten launches.
_free: dict[torch.device, list[torch.cuda.Event]] = {}


class PhaseClock:
    """Wall seconds of consecutive phases of one step; on a GPU marking the end of a phase does not wait for it.

    A GPU runs behind the host. Until :meth:`settle`, which the host calls once it has waited for the results of a step,
    marks are events on the GPU's own clock; from then on the host's clock counts. What the GPU still did of the
    previous step's last phase when this step began is part of the first phase marked after ``settle``: the seconds of
    all phases add up to the wall time of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[str, torch.cuda.Event]] | None = None
        self.seconds = dict.fromkeys(PHASES, 0.0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._events = [("", self._event())]
        progress.phase(PHASES[0])
        self._start = self._last = time.perf_counter()

    def mark(self, phase: str) -> float:
        """End a phase now; its seconds, 0 as long as they are not known."""
        progress.phase(PHASES[PHASES.index(phase) + 1])
        if self._events is not None:
            self._events.append((phase, self._event()))
            return 0.0
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        self.seconds[phase] = spent
        return spent

    def settle(self) -> None:
        """Read the phases marked so far; the GPU has passed their marks."""
        events, self._events = self._events or [], None
        for (_, begin), (phase, end) in itertools.pairwise(events):
            self.seconds[phase] = begin.elapsed_time(end) / 1000
            self._last += self.seconds[phase]
        _free.setdefault(self._device, []).extend(event for _, event in events)

    def total(self) -> float:
        """Seconds since the step began, up to the last phase that was read."""
        return self._last - self._start

    def peak_bytes(self) -> int | None:
        """Peak GPU memory allocated since the step began, None on a CPU."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def _event(self) -> torch.cuda.Event:
        free = _free.get(self._device)
        event = free.pop() if free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def step_details(record: Any, objective: str) -> tuple[str, ...]:
    """What a step (a ``StepRecord``) is told by, the most telling first."""
    # A difference of two losses, below 0 where right answers are likelier.
    loss = "right minus wrong NLL" if objective == "margin" else "loss"
    speed = record.tokens / max(record.seconds, 1e-9)
    return f"sparsity {record.sparsity:.4f}", f"{loss} {record.loss:.4f}", f"{speed:,.0f} tokens/s"


def score_histogram(ranking: Ranking, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Histogram of log10 of the live scores that are positive, heads and channels apart, on common edges.

    Args:
        heads: number of units of heads; they come first.

    Returns:
        On the device: edges, float64 [bins + 1], zero if no score is positive, and counts, int64 [2, bins + 1], the
        last of them those of scores at or below zero (second-order scores may be, and are not on the axis).
    """
    logs = ranking.ascending.clamp_min(0).log10()
    last = (logs < math.inf).sum() - 1
    first = (logs == -math.inf).sum()
    found = first <= last
    low, high = (logs.gather(0, i.clamp(0, len(logs) - 1).view(1)) for i in (first, last))
    high = torch.where(high > low, high, low + 1e-6)
    edges = torch.arange(_BINS + 1, dtype=torch.float64, device=logs.device) * ((high - low) / _BINS) + low
    edges = torch.cat((edges[:-1], high))
    total = _counts(logs, edges)
    logs_of_heads = ranking.values[:heads].clamp_min(0).log10().sort().values
    of_heads = _counts(logs_of_heads, edges)
    counts = torch.where(found, torch.stack((of_heads, total - of_heads)), 0)
    heads_off = (logs_of_heads == -math.inf).sum()
    off = torch.stack((heads_off, first - heads_off))
    return torch.where(found, edges, 0.0), torch.cat((counts, off[:, None]), dim=1)


def histogram_record(edges: torch.Tensor, counts: torch.Tensor) -> dict[str, Any]:
    """The histogram as ``metrics.jsonl`` holds it, from CPU tensors."""
    (*heads, heads_off), (*channels, channels_off) = counts.tolist()
    return {
        "log10_edges": edges.tolist(),
        "heads": heads,
        "channels": channels,
        "not_positive": {"heads": heads_off, "channels": channels_off},
    }


def _counts(ascending: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Numbers between consecutive edges, the last edge included."""
    below = torch.searchsorted(ascending, edges)
    below[-1:] = torch.searchsorted(ascending, edges[-1:], right=True)
    return below.diff()
