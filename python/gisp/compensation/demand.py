"""What a compensation asks of memory where the layers of the model lie in host memory: upper estimates for a plan."""

from __future__ import annotations

from dataclasses import replace

import torch

from gisp.compensation.options import METHODS, CompensationOptions
from gisp.compensation.pruned.batch_sizes import most_tokens
from gisp.compensation.pruned.predictions import logits_bytes
from gisp.compensation.streams import batch_tokens
from gisp.data import Sequences
from gisp.data.held_out import hold_out, interleaved, without
from gisp.model.keep import Keep
from gisp.model.structures import ModelMap
from gisp.offload.plan import Advice, Demand
from gisp.run.resources.placement import weights_of

_DOUBLE, _FLOAT = 8, 4
COMPENSATING = Advice(
    device="give fewer --calibration-tokens, or more --gpu-memory",
    host="free some, or give --compensate lsq or rescale, which take less than kfac",
)


def demand(
    model_map: ModelMap,
    keep: Keep,
    options: CompensationOptions,
    data: Sequences,
    device: torch.device,
    run_text: Sequences | None = None,
) -> Demand:
    """What fitting a compensation with layers in host memory asks of memory.

    Args:
        model_map: of the dense model or of its shapes alone.
        keep: what stays.
        data: calibration sequences.
        device: computes.
        run_text: held-out text of the run that the model was pruned in.

    Raises:
        GispError: too few sequences.
    """
    hidden, size = model_map.hidden_size, next(model_map.model.parameters()).element_size()
    widths = [
        width
        for item in model_map.layers
        for width, full in zip(
            (len(columns) for columns in keep.columns(item.index, model_map.head_dim)),
            (model_map.num_heads * model_map.head_dim, model_map.intermediate_size),
            strict=True,
        )
        if width < full
    ]
    widest = max(widths, default=0)
    seen, unseen = hold_out(interleaved(data))
    parts = seen, unseen, without(run_text, data)
    total, held, watched = (sum(len(ids) for ids, _ in part.rows) if part else 0 for part in parts)
    fitted = min(int(options.tokens or 0), total)
    # Of every held-out token the state that the head reads, of either model; of the run's text of the pruned one.
    waiting = (2 * held + watched) * hidden * size
    busiest, beside = logits_bytes(model_map, total + held + watched, device), 0
    inputs = 0
    for name in options.methods:
        if METHODS[name].kind == "fit":
            busiest = max(busiest, _fit(model_map, name, options, widest, fitted + held, held, device))
            beside = max(beside, _FLOAT * hidden * sum(widths))
        else:
            tokens = min(most_tokens(model_map, device), fitted)
            inputs = tokens * hidden * size
            moments = [width * width + hidden * hidden + width * hidden for width in widths]
            # Those of a layer's two projections, or of one of them in double precision while it is solved.
            here = _FLOAT * 2 * max(moments, default=0) + _DOUBLE * 3 * max(moments, default=0)
            busiest = max(busiest, here + _activations(model_map, tokens) + 3 * inputs)
            beside = max(beside, _FLOAT * sum(moments))
    # Output projections of pruned blocks, and either what moves them or what they become.
    beside = _FLOAT * hidden * sum(widths) + max(beside, size * hidden * sum(widths))
    return replace(weights_of(model_map.model), inputs=inputs, working=waiting + busiest, beside=beside)


def _fit(
    model_map: ModelMap,
    name: str,
    options: CompensationOptions,
    widest: int,
    tokens: int,
    held: int,
    device: torch.device,
) -> int:
    """Bytes of fitting one projection: the residual streams, its inputs and its sums, as they are solved."""
    hidden, size = model_map.hidden_size, next(model_map.model.parameters()).element_size()
    # One stream is made of another where a block is passed by.
    streams = (3 if options.target == "dense" else 2) * tokens * hidden * size
    inputs = tokens * widest * size + held * hidden * _FLOAT
    weight = 3 * _FLOAT * hidden * widest
    sums = _DOUBLE * (3 * widest * widest + 4 * hidden * widest) if name == "lsq" else _DOUBLE * hidden * widest
    return streams + inputs + weight + sums + _activations(model_map, min(batch_tokens(device), tokens))


def _activations(model_map: ModelMap, tokens: int) -> int:
    """Bytes of one layer at its busiest moment, some of it in float32."""
    size = next(model_map.model.parameters()).element_size()
    return tokens * ((16 * model_map.hidden_size + 4 * model_map.intermediate_size) * size + 12 * model_map.hidden_size)
