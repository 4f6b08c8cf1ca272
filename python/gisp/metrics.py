"""What a step reports beside its result: seconds per phase, peak memory, the distribution of scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gisp.select import Block

_BINS = 40
PHASES = ("forward_backward", "select", "compact", "write")


class PhaseClock:
    """Wall seconds of consecutive phases of one step; a GPU is waited for at each mark."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._start = self._last = time.perf_counter()

    def mark(self, phase: str) -> float:
        """End a phase now; its seconds."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        self.seconds[phase] = spent
        return spent

    def total(self) -> float:
        return self._last - self._start

    def peak_bytes(self) -> int | None:
        """Peak GPU memory allocated since the step began, None on a CPU."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None


def score_histogram(normalised: np.ndarray, blocks: Sequence[Block]) -> dict[str, Any]:
    """Histogram of log10 of the live scores, heads and channels apart, on common edges."""
    with np.errstate(divide="ignore"):
        logs = np.log10(normalised)
    live = np.isfinite(logs)
    if not live.any():
        return {"log10_edges": [0.0] * (_BINS + 1), "heads": [0] * _BINS, "channels": [0] * _BINS}
    low, high = float(logs[live].min()), float(logs[live].max())
    edges = np.linspace(low, high if high > low else low + 1e-6, _BINS + 1)
    boundary = next((b.start for b in blocks if b.name.endswith("channels")), len(logs))
    heads, channels = logs[:boundary], logs[boundary:]
    return {
        "log10_edges": edges.tolist(),
        "heads": np.histogram(heads[np.isfinite(heads)], edges)[0].tolist(),
        "channels": np.histogram(channels[np.isfinite(channels)], edges)[0].tolist(),
    }
