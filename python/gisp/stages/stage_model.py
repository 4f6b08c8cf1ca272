"""The model of one stage: the parameters it holds are in this process, all others on ``meta``."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gisp.config.options import PruneConfig
from gisp.errors import GispError
from gisp.model.checks import check_weights
from gisp.model.load import resolve_device, resolve_dtype
from gisp.model.structures import (
    ModelMap,
    fingerprint_of,
    fingerprint_parts,
    first_bad_parameter,
    map_model,
    protected_layers,
)
from gisp.replicas.agreement import refusing_together
from gisp.stages.costs import layer_costs
from gisp.stages.group import Stages
from gisp.stages.load import put, read_weights, skeleton
from gisp.stages.placement import Placement, place
from gisp.stages.rules import Sharing, check_sharing

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Passes of a step that borders are chosen for where the data are not read yet.
_TOKENS = 1024


def stage_model(model: nn.Module | str, config: PruneConfig, stages: Stages) -> Any:
    """The model with the layers of this stage in this process, all others on ``meta``.

    Args:
        model: a folder, of which no more is read; or a model of which at least these layers are here. What of it lies
            in other stages is given up.

    Raises:
        GispError: a model that cannot be split by layers.
    """
    device = resolve_device(config.device)
    if isinstance(model, nn.Module):
        dense: Any = model
    else:
        dense = skeleton(model, _dtype(config, device))
    placement = placement_of(dense, config, stages.count)
    stages.placement = placement
    if not isinstance(model, nn.Module):
        return read_stage_model(dense, model, placement, stages, device)
    names = held_names(dense, placement, stages.stage)
    with refusing_together(stages.processes):
        _check_here(dense, names)
        move_to_meta(dense, names)
        _check_finite(dense)
    return dense


def read_stage_model(model: Any, path: str, placement: Placement, stages: Stages, device: torch.device) -> Any:
    """A skeleton with the weights that a stage holds, from the files of a folder, and its tables on the device.

    Raises:
        GispError: in all processes, what one of them refuses.
    """
    with refusing_together(stages.processes):
        read_weights(model, path, held_names(model, placement, stages.stage), device)
        model.model.rotary_emb.to(device)
        _check_finite(model)
    return model


def _check_finite(model: nn.Module) -> None:
    bad = first_bad_parameter(model)
    if bad is not None:
        raise GispError(f"the model holds NaN or infinite weights in {bad}: give a sound model")


@contextmanager
def only_layers(decoder: Any, layers: Iterable[nn.Module], *, ends: bool) -> Iterator[Any]:
    """A model's own decoder with some of its layers alone, and its final norm only where it ends."""
    held = decoder.layers, decoder.norm
    decoder.layers = nn.ModuleList(layers)
    if not ends:
        decoder.norm = nn.Identity()
    try:
        yield decoder
    finally:
        decoder.layers, decoder.norm = held


def placement_of(model: Any, config: PruneConfig, stages: int) -> Placement:
    """Where the layers of a dense model go.

    Raises:
        GispError: fewer layers than stages, or a model of a kind that was never tried.
    """
    model_map = map_model(model, config.gqa)
    layers = len(model_map.layers)
    check_sharing(Sharing(stages, stages, layers, model_map.model_type))
    protected = protected_layers(layers, config.protect_first, config.protect_last)
    lowest = min(set(range(layers)) - protected, default=layers)
    slices = int(config.slices or 1)
    return place(layer_costs(model_map, lowest), stages, [_TOKENS] * slices)


def held_names(model: nn.Module, placement: Placement, stage: int) -> set[str]:
    """Names of the parameters of a stage: its layers, at the ends of the model embeddings, last norm and output.

    Tied embeddings are at both ends; pruning never changes them.
    """
    held, last = {*placement.held(stage)}, placement.stage_of(len(placement.chunks) - 1)
    output = next((name for name, p in model.named_parameters() if p is _output(model)), None)
    found = set()
    for name, _ in model.named_parameters():
        layer = _LAYER.match(name)
        if layer:
            here = int(layer[1]) in held
        elif name.startswith("model.embed_tokens."):
            here = stage == 0 or (stage == last and name == output)
        else:
            here = stage == last
        if here:
            found.add(name)
    return found


def move_to_meta(model: nn.Module, names: Collection[str]) -> None:
    """Give up the parameters that are not among ``names``: they keep shape and dtype, on ``meta``."""
    for name, parameter in [*model.named_parameters()]:
        if name not in names and not parameter.is_meta:
            put(model, parameter, torch.empty_like(parameter, device="meta"))


def shared_fingerprint(model_map: ModelMap, stages: Stages) -> str:
    """The fingerprint of the whole model, the same in every process."""
    own = {name: part.hex() for name, part in fingerprint_parts(model_map.model).items()}
    parts: dict[str, bytes] = {}
    for answer in stages.processes.exchange(json.dumps(own).encode()):
        parts |= {name: bytes.fromhex(part) for name, part in json.loads(answer).items()}
    return fingerprint_of(parts)


def _output(model: Any) -> Any:
    return model.get_output_embeddings().weight


def _dtype(config: PruneConfig, device: torch.device) -> torch.dtype:
    dtype = resolve_dtype(config.dtype, device)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _check_here(model: nn.Module, names: Collection[str]) -> None:
    missing = next((name for name, p in model.named_parameters() if name in names and p.is_meta), None)
    if missing is not None:
        raise GispError(f"{missing} of this stage is on meta: give a model whose layers of this stage have weights")
    check_weights((name, parameter) for name, parameter in model.named_parameters() if not parameter.is_meta)
