"""How fast a model reads a prompt and writes tokens, and what it holds in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common.measure import summarised
from gisp.model.fuse import fuse

Step = Callable[[], Any]
_WARM_UP = 3


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        prompt: tokens of the prompt, one sequence.
        context: tokens already in the cache when decoding.
        batches: batch sizes of decoding.
        repetitions: of everything; the median counts.
        graph: replay captured CUDA graphs when decoding, and of a prompt beside the eager pass, as serving engines do;
            otherwise the host's launches count.
        fused: norms and MLP activations run as one kernel each (``gisp.fuse``), in dense and pruned models alike.
    """

    prompt: int
    context: int
    batches: tuple[int, ...]
    repetitions: int
    graph: bool
    fused: bool = True


@torch.no_grad()
def measure_inference(model: Any, setting: Setting) -> dict[str, Any]:
    """Milliseconds and bytes of one model, JSON-ready.

    ``prefill_ms`` is the pass over the prompt with the logits of its last token, ``captured_prefill_ms`` a replay of it
    (``None`` without a graph), ``first_token_ms`` the eager pass and the choice of the token on the host; ``decode_ms``
    a token for every sequence of a batch. ``times`` also has their quartiles.
    """
    if setting.fused:
        fuse(model)
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (1, setting.prompt), device=device)

    def prefill() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        return logits

    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "kv_bytes_per_token": _kv_bytes(model),
    }
    times = {
        "prefill": _times(prefill, device, setting.repetitions),
        "first token": _times(lambda: int(prefill()[0, -1].argmax()), device, setting.repetitions),
    }
    if device.type == "cuda" and setting.graph:
        times["captured prefill"] = _times(captured(prefill, device), device, setting.repetitions)
    for batch in setting.batches:
        step = decode_step(model, batch, setting)
        times[f"decode of batch {batch}"] = _times(step, device, 4 * setting.repetitions)
    return {
        **result,
        "prefill_ms": times["prefill"]["median_ms"],
        "captured_prefill_ms": times["captured prefill"]["median_ms"] if "captured prefill" in times else None,
        "first_token_ms": times["first token"]["median_ms"],
        "decode_ms": {str(batch): times[f"decode of batch {batch}"]["median_ms"] for batch in setting.batches},
        "times": times,
    }


def decode_step(model: Any, batch: int, setting: Setting) -> Step:
    """A function that decodes one token for every sequence, always at the same place of a static cache."""
    from transformers import StaticCache

    device = next(model.parameters()).device
    cache = StaticCache(config=model.config, max_cache_len=setting.context + 8)
    # Fills the cache and, on a GPU, takes all memory before anything is captured.
    prompt = torch.randint(0, model.config.vocab_size, (batch, setting.context), device=device)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    place = torch.tensor([setting.context], device=device)

    def run() -> torch.Tensor:
        for layer in cache.layers:
            _rewind(layer, setting.context)
        out = model(input_ids=ids, past_key_values=cache, position_ids=place[None], use_cache=True)
        logits: torch.Tensor = out.logits
        return logits

    return captured(run, device) if device.type == "cuda" and setting.graph else run


def captured(run: Step, device: torch.device) -> Step:
    """What ``run`` launches as a CUDA graph, without the host's part. A call replays it and gives the captured result.

    The graph holds the memory of one run for as long as it lives.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def _rewind(layer: Any, length: int) -> None:
    """Let the next token of a static cache layer go behind the first ``length``."""
    seen = layer.cumulative_length
    if isinstance(seen, torch.Tensor):
        seen.fill_(length)
    else:
        layer.cumulative_length = length


def _kv_bytes(model: Any) -> int:
    size = next(model.parameters()).element_size()
    return sum(2 * layer.self_attn.k_proj.out_features * size for layer in model.model.layers)


def _times(step: Step, device: torch.device, repetitions: int) -> dict[str, Any]:
    """Milliseconds of a finished call."""
    for _ in range(_WARM_UP):
        step()
    times = []
    for _ in range(repetitions):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        times.append(1000 * (time.perf_counter() - start))
    return summarised(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
