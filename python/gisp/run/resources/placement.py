"""Where the layers of a run lie that may be larger than its GPU: what it asks of memory, and the plan made of that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gisp.config.criteria import CRITERIA
from gisp.config.memory import bytes_of, gigabytes
from gisp.config.options import PruneConfig
from gisp.data import Sequences
from gisp.model.load import resolve_device, resolve_dtype, skeleton
from gisp.model.structures import ModelMap, map_model
from gisp.offload.host import available_bytes, numbered
from gisp.offload.place import untied_ends
from gisp.offload.plan import PRUNING, Advice, Demand, Plan, make_plan
from gisp.progress import note
from gisp.replicas.environment import processes_here
from gisp.run.resources.estimate import pass_tokens, step_tokens
from gisp.score.fused import why_not
from gisp.score.fused.lm_head import CHUNK_ELEMENTS


def skeleton_of(path: str, config: PruneConfig) -> Any:
    """The shapes of the model of a run, before its weights are loaded."""
    return skeleton(path, resolve_dtype(config.dtype, resolve_device(config.device)))


def plan_of(model: Any, data: Sequences, config: PruneConfig) -> Plan | None:
    """Where the layers of a run lie, told to whoever hears of progress; ``None`` where all are on the device.

    Args:
        model: the dense model or its shapes alone.

    Raises:
        GispError: it does not fit.
    """
    limit = usable_bytes(numbered(resolve_device(config.device)), config.gpu_memory, model)
    found = demand(map_model(model), data, config)
    return told_plan(found, limit, everything=config.offload == "always")


def usable_bytes(device: torch.device, gpu_memory: str | None, model: Any = None) -> int | None:
    """Bytes of a device that may be taken, ``None`` for no limit; torch takes no more of a GPU than ``gpu_memory``.

    Args:
        model: one that moves, so that what of it is on the device counts as free.
    """
    limit = None if gpu_memory is None else bytes_of(gpu_memory)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        parameters = [] if model is None else model.parameters()
        free += sum(p.numel() * p.element_size() for p in parameters if p.device == device)
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        limit = free if limit is None else min(limit, free)
    return limit


def told_plan(found: Demand, limit: int | None, *, everything: bool, advice: Advice = PRUNING) -> Plan | None:
    """The plan for what is asked of memory, told to whoever hears of progress.

    Raises:
        GispError: it does not fit.
    """
    free = available_bytes()
    host = None if free is None else free // processes_here()
    plan = make_plan(found, everything=everything, limit=limit, host=host, advice=advice)
    if plan is None:
        note(f"offload: the model fits, nothing is in host memory ({gigabytes(sum(found.layers) + found.rest)})")
        return None
    for line in plan.lines():
        note(line)
    return plan


def demand(model_map: ModelMap, data: Sequences, config: PruneConfig) -> Demand:
    """What a run with layers in host memory asks of memory."""
    model = model_map.model
    weight = next(model.parameters())
    size, hidden, channels = weight.element_size(), model_map.hidden_size, model_map.intermediate_size
    longest = max(len(ids) for ids, _ in data.rows)
    tokens, together = step_tokens(data, config), pass_tokens(model_map, data, config, resolve_device(config.device))
    # About what a layer keeps of a token, and what its busiest moment takes, by either pass.
    working = together * (16 * hidden + 4 * channels) * size
    if CRITERIA[config.criterion].gradient == "second-order":
        # Gradients of gates of every sequence and structure.
        structures = sum(group.count for group in model_map.groups)
        working += 4 * structures * max(1, tokens // longest)
    weights = weights_of(model)
    if CRITERIA[config.criterion].gradient == "absolute":
        working += 4 * max(weights.layers) // size
    fused = why_not(model_map, longest) is None
    logits = together * model_map.vocab_size
    working += 2 * size * min(CHUNK_ELEMENTS, logits) if fused else 8 * logits
    return replace(weights, inputs=tokens * hidden * size, working=working)


def weights_of(model: Any) -> Demand:
    """What the weights of a model ask of memory, layers of which lie in host memory."""
    layers = tuple(_bytes(layer) for layer in model.model.layers)
    matrices = (p for p in model.model.layers.parameters() if p.dim() == 2)
    embedding, head = (_bytes(end) if end else 0 for end in untied_ends(model))
    return Demand(
        layers=layers,
        rest=_bytes(model) - sum(layers),
        largest=max((p.numel() * p.element_size() for p in matrices), default=0),
        inputs=0,
        working=0,
        # Files are mapped, and copied layer by layer; weights of another dtype are converted all at once.
        loading=_bytes(model) if _converted(model) else 0,
        embedding=embedding,
        head=head,
    )


def _bytes(module: nn.Module) -> int:
    """Of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _converted(model: Any) -> bool:
    if not next(model.parameters()).is_meta:
        return False
    return getattr(model.config, "dtype", None) not in (None, next(model.parameters()).dtype)
