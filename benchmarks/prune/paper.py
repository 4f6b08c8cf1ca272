"""One step the paper's way, as a baseline: autograd over the whole model, then scores read from ``.grad``.

Small batches, gradients of every parameter accumulated in the model's dtype, and |W * G| summed eagerly (GISP, arXiv
2510.18030, Eq. 8). What a whole run of it takes is extrapolated from the dense model.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

BATCH, LENGTH = 2, 256
STEPS, SEQUENCES = 280, 2000
_WARM_UP, _BATCHES = 2, 16


@dataclass(frozen=True)
class PaperStep:
    """What the paper's way costs on the dense model.

    Attributes:
        tokens_per_second: forward and backward, batches of 2 x 256 tokens.
        extraction_seconds: scores of all heads and channels from the gradients.
        hours: of 280 steps of 2000 sequences of 256 tokens at that speed.
        peak_bytes: peak GPU memory, ``None`` on a CPU.
    """

    tokens_per_second: float
    extraction_seconds: float
    hours: float
    peak_bytes: int | None


def run_hours(tokens_per_second: float, extraction_seconds: float) -> float:
    """Hours of a whole run of the paper's schedule at the speed of the dense model."""
    return STEPS * (SEQUENCES * LENGTH / tokens_per_second + extraction_seconds) / 3600


def time_paper_step(model: Any, tokens: torch.Tensor, batches: int = _BATCHES) -> dict[str, Any]:
    """:class:`PaperStep` of a dense model as JSON-ready values; its gradients are gone afterwards.

    Args:
        tokens: int64 [N, 256] on the CPU, at least two rows.
    """
    device = next(model.parameters()).device
    batch = [tokens[2 * i % (len(tokens) - 1) :][:BATCH].to(device) for i in range(batches)]
    model.requires_grad_(True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for ids in batch[:_WARM_UP]:
        _accumulate(model, ids)
    start = _now(device)
    for ids in batch:
        _accumulate(model, ids)
    seconds = _now(device) - start
    _scores(model)
    start = _now(device)
    _scores(model)
    extraction = _now(device) - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    model.zero_grad(set_to_none=True)
    speed = sum(ids.numel() for ids in batch) / seconds
    return asdict(PaperStep(speed, extraction, run_hours(speed, extraction), peak))


def _accumulate(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@torch.no_grad()
def _scores(model: Any) -> torch.Tensor:
    """Scores of all heads and channels, as eager code sums them."""
    found = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            found.append(_taylor(linear).sum(1).view(-1, attention.head_dim).sum(1))
        found.append(_taylor(attention.o_proj).sum(0).view(-1, attention.head_dim).sum(1))
        found.append(_taylor(mlp.gate_proj).sum(1) + _taylor(mlp.up_proj).sum(1) + _taylor(mlp.down_proj).sum(0))
    return torch.cat(found)


def _taylor(linear: Any) -> torch.Tensor:
    product: torch.Tensor = (linear.weight.float() * linear.weight.grad.float()).abs()
    return product


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
