"""One timed `gisp.compensate` of a model pruned in place: wall time, peak memory, and what it did to the loss."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from gisp import compensate
from gisp.compensation import CompensationOptions, MethodResult


def timed_compensation(model: Any, tokens: torch.Tensor, options: CompensationOptions) -> dict[str, Any]:
    """Compensate a pruned model and tell what it took, JSON-ready.

    Args:
        tokens: calibration tokens, int64 [N, S], on the CPU.
    """
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    ends: list[float] = []
    done = compensate(model, tokens, on_block=lambda _: ends.append(time.perf_counter()), **asdict(options))
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    fits = [result for result in done.results if result.blocks]
    blocks = [block.after / block.before for result in fits for block in result.blocks if block.before > 0]
    return {
        "method": options.method,
        "seconds": seconds,
        "fit_seconds": ends[-1] - start if ends else seconds,
        "fit_tokens": sum(result.tokens for result in fits),
        "blocks": len(done.updates),
        "squares_left": sum(blocks) / len(blocks) if blocks else None,
        "steps": [step for result in done.results if result not in fits for step in _steps(result)],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def _steps(result: MethodResult) -> list[dict[str, Any]]:
    """Steps on the loss; of training all of them as one."""
    if not result.steps:
        return [{"tokens": result.tokens, "size": float(result.kept), "before": result.before, "after": result.after}]
    return [{"tokens": s.tokens, "size": s.size, "before": s.before, "after": s.after} for s in result.steps]
