"""What a run will take, told before it starts: seconds from a timed product and counted ones, memory from a formula."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from gisp.config.criteria import CRITERIA
from gisp.config.memory import gigabytes
from gisp.config.options import PruneConfig
from gisp.data import Sequences
from gisp.model.structures import ModelMap
from gisp.offload.host import system_bytes
from gisp.progress import hears_notes, note
from gisp.score.context import Context

# Of the speed of its largest product a whole pass reaches about this part: attention, norms and the optimum of small
# shapes. Steps of the demo decoder on a CPU lay between 0.4 and 0.6.
_EFFICIENCY = 0.45
_TIMED_TOKENS, _TIMED_SECONDS = 512, 0.05
# Products of a pass by how a criterion takes its scores: forward, gradients of activations, gradients of weights.
_PRODUCTS = {"second-order": 2, "weights": 3, "forward": 1}
_LONG_SECONDS = 30 * 60


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        seconds: of all steps.
        bytes: at the fullest moment: weights, what a pass keeps for its backward, logits, summed gradients.
    """

    seconds: float
    bytes: int


def step_tokens(data: Sequences, config: PruneConfig) -> int:
    """Tokens of a step."""
    total = sum(len(ids) for ids, _ in data.rows)
    return min(total, config.batch_tokens) if config.engine == "stream" else total


def pass_tokens(model_map: ModelMap, data: Sequences, config: PruneConfig, device: torch.device) -> int:
    """Tokens that pass through the model together."""
    longest = max(len(ids) for ids, _ in data.rows)
    tokens = step_tokens(data, config)
    if config.batch_size:
        return min(tokens, config.batch_size * longest)
    if config.engine == "exact":
        # As gisp.data.batches bounds a pass over a whole set.
        return min(tokens, max(longest, (2**24 if device.type == "cpu" else 2**29) // model_map.vocab_size))
    return tokens


def estimate(model_map: ModelMap, data: Sequences, config: PruneConfig) -> Estimate:
    """Seconds and memory of a run on the device the model lies on; about a twentieth of a second is measured."""
    tokens = step_tokens(data, config)
    return Estimate(_seconds(model_map, tokens, config), memory(model_map, data, config))


def memory(model_map: ModelMap, data: Sequences, config: PruneConfig) -> int:
    """Bytes of a run at its fullest moment, on the device of the model."""
    weight = model_map.weight
    size, passes = weight.element_size(), _passes(config)
    tokens = pass_tokens(model_map, data, config, weight.device)
    heads = (model_map.num_heads + 2 * model_map.num_kv_heads) * model_map.head_dim
    layer = 2 * model_map.hidden_size + heads + 2 * model_map.intermediate_size
    if weight.device.type == "cpu":
        # Attention is kept as well, which a GPU does where there is room; of shared heads with a key and a value each.
        layer += (3 if model_map.shares_kv else 1) * model_map.num_heads * model_map.head_dim
    # Of a pass without a backward one layer is there at a time.
    kept = tokens * layer * size * (_held_layers(model_map) if passes > 1 else 1)
    logits = 2 * tokens * model_map.vocab_size * 4
    sums = model_map.decoder_parameters * 4 if passes == 3 and config.engine == "exact" else 0
    return _held_parameters(model_map) * size + kept + logits + sums


def _held_parameters(model_map: ModelMap) -> int:
    """Parameters that lie in this process, tied ones once."""
    return sum(p.numel() for p in model_map.model.parameters() if not p.is_meta)


def _held_layers(model_map: ModelMap) -> int:
    return sum(not item.attention.o_proj.weight.is_meta for item in model_map.layers)


def _passes(config: PruneConfig) -> int:
    """Products of a pass over the data, by matrix."""
    what = CRITERIA[config.criterion]
    if what.gradient is None:
        return _PRODUCTS["forward"]
    return _PRODUCTS["second-order" if what.gradient == "second-order" else "weights"]


def _seconds(model_map: ModelMap, tokens: int, config: PruneConfig) -> float:
    # A run that is resumed may have layers without a channel.
    matrices = (item.layer.mlp.gate_proj.weight.detach() for item in model_map.layers)
    matrix = max((matrix for matrix in matrices if not matrix.is_meta), key=torch.Tensor.numel)
    if not matrix.numel():
        return 0.0
    output = model_map.hidden_size * model_map.vocab_size
    # Widths shrink evenly: on average half of what goes is there.
    average = model_map.decoder_parameters * (1 - float(config.sparsity or config.ratio or 0) / 2)
    operations = 2 * tokens * (average * _passes(config) + 2 * output) * config.steps
    return operations / (_speed(matrix, min(tokens, _TIMED_TOKENS)) * _EFFICIENCY)


def _speed(matrix: torch.Tensor, tokens: int) -> float:
    """Operations per second of a product with a matrix of the model."""
    states = torch.ones(tokens, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    count, passed = 0, 0.0
    with torch.no_grad():
        float((states @ matrix.T)[0, 0])
        start = time.perf_counter()
        while passed < _TIMED_SECONDS:
            # Reading a number waits for the device.
            float((states @ matrix.T)[0, 0])
            count += 1
            passed = time.perf_counter() - start
    return count * 2 * tokens * matrix.numel() / passed


def announce(model_map: ModelMap, context: Context, steps_left: int) -> None:
    """Tell whoever hears of progress what a run will take, and what to do where that is much.

    Of a split model the memory is that of the first stage.
    """
    if not hears_notes():
        return
    data, config, processes = context.data, context.config, context.replicas.size
    if context.stages is not None and context.stages.placement is not None:
        chunks = len(context.stages.placement.chunks) // context.stages.count
        held = [len([*context.stages.placement.held(stage)]) for stage in range(context.stages.count)]
        note(f"stages: {', '.join(map(str, held))} layers, in {chunks} chunk{'s' * (chunks > 1)} each")
    found = estimate(model_map, data, config)
    device = model_map.weight.device
    seconds = found.seconds * steps_left / config.steps / processes
    for line in lines(seconds, found.bytes, device, free_bytes(model_map), busy_cores()):
        note(line)


def lines(seconds: float, size: int, device: torch.device, free: int | None, busy: float) -> list[str]:
    """What is said of an estimate.

    Args:
        free: bytes that are free on the device, ``None`` where that is not known.
        busy: cores that other programs keep busy.
    """
    threads = torch.get_num_threads()
    on = f"{device.type}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)
    said = [f"estimate: {_duration(seconds)} and {gigabytes(size)} on {on}"]
    if device.type == "cpu" and seconds > _LONG_SECONDS:
        said.append("  that is long: time follows --steps times --batch-tokens, give less of one, or run on a GPU")
    if free is not None and size > free:
        said.append(f"  {gigabytes(free)} are free: give a smaller --batch-size or --batch-tokens")
    if device.type == "cpu" and threads > 1 and busy >= 1 and busy + threads > (os.cpu_count() or 1):
        said.append(
            f"  other programs keep about {busy:.0f} of {os.cpu_count()} cores busy: {threads} threads wait for one "
            "another, OMP_NUM_THREADS=1 may be faster"
        )
    return said


def _duration(seconds: float) -> str:
    """With units, as a bare 13:30:58 reads like a time of day."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def busy_cores() -> float:
    """Average number of running processes of the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def free_bytes(model_map: ModelMap) -> int | None:
    """Memory a run may take on its device, weights included; ``None`` where the system does not tell."""
    weight = model_map.weight
    if weight.device.type == "cuda":
        return int(torch.cuda.mem_get_info(weight.device)[0]) + torch.cuda.memory_reserved(weight.device)
    free = system_bytes()
    return None if free is None else free + _held_parameters(model_map) * weight.element_size()
