"""Whether a model can be scored by the fused pass: a look at its modules, then a comparison of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from gisp.model.fuse import is_rms_norm, is_silu
from gisp.model.structures import ModelMap
from gisp.offload.stream import LayerStream

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
# Difference between two correct forward passes of a deep model in the given precision, with room; a wrong one is off by
# its own size.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def why_not(model_map: ModelMap, length: int) -> str | None:
    """Why the pass cannot score this model on sequences of ``length`` tokens, ``None`` if it can.

    The modules are read for what the pass replaces. What they compute beyond that is not guessed:
    :func:`differs` compares the numbers.
    """
    model = model_map.model
    decoder = model.model
    stream = LayerStream.of(model)
    own = stream.hooks if stream else frozenset()
    if any(_hooked(module, own) for module in model.modules()):
        return "a module has hooks or a forward of its own"
    if not isinstance(getattr(decoder, "embed_tokens", None), nn.Embedding) or not hasattr(decoder, "rotary_emb"):
        return "no token embedding and rotary tables"
    if not is_rms_norm(getattr(decoder, "norm", None)):
        return "no final RMS norm"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return "the output projection is no plain Linear without bias"
    # Of a model that is split over processes the rest lies on meta, of one that is not loaded yet all of it.
    devices = {p.device for p in model.parameters() if not (p.is_meta or (stream and stream.holds(p)))}
    dtypes = {p.dtype for p in model.parameters()}
    if len(devices) > 1 or len(dtypes) != 1 or not dtypes <= _TOLERANCE.keys():
        return "parameters of several devices or dtypes"
    for item in model_map.layers:
        reason = _layer_reason(item, length)
        if reason is not None:
            return f"layer {item.index}: {reason}"
    return None


@torch.no_grad()
def differs(model: Any, streams: Mapping[int, torch.Tensor], ids: torch.Tensor) -> str | None:
    """Where the pass differs from the model, ``None`` if nowhere.

    The model goes on from each stream of the pass: roundings of two ways to compute the same add up over layers, and in
    16 bits the last states of 80 layers are far apart.

    Args:
        streams: [T, D], as :meth:`gisp.score.fused.ImportancePass.streams` computed them for ``ids``.
        ids: int64 [B, S].
    """
    decoder, last = model.model, max(streams)
    found: dict[int, float | None] = {}

    def enter(number: int, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found[number] = distance_of(streams[number], args[0])
        return streams[number].view_as(args[0]), *args[1:]

    handles = [decoder.layers[i].register_forward_pre_hook(partial(enter, i)) for i in streams if i < last]
    try:
        expected = decoder(input_ids=ids.to(streams[last].device), use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    found[last] = distance_of(decoder.norm(streams[last]), expected)
    apart = next(((number, distance) for number, distance in sorted(found.items()) if distance is not None), None)
    return None if apart is None else f"the hidden state after layer {apart[0] - 1} is off by {apart[1]:.1e}"


def distance_of(found: torch.Tensor, expected: torch.Tensor) -> float | None:
    """Relative distance of hidden states [T, D] from the model's own [B, S, D], ``None`` if they agree.

    Every token counts alike: the first one of a sequence may be a hundred times as large as the others.
    """
    own = expected.flatten(0, 1).double()
    distances = (found.double() - own).norm(dim=1) / own.norm(dim=1).clamp_min(1e-30)
    distance = float(distances.square().mean().sqrt())
    return None if distance <= _TOLERANCE[found.dtype] else distance


def _layer_reason(item: Any, length: int) -> str | None:
    layer, attention, mlp = item.layer, item.attention, item.layer.mlp
    extra = {name for name, _ in layer.named_children()} - _PARTS
    if extra:
        return f"it also has {', '.join(sorted(extra))}"
    norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if not all(is_rms_norm(norm) for norm in norms):
        return "its norms are no RMS norms"
    if any(norm is not None and not is_rms_norm(norm) for norm in head_norms) or head_norms.count(None) == 1:
        return "its head norms are no RMS norms"
    window = getattr(attention, "sliding_window", None) or getattr(attention.config, "sliding_window", None)
    if window is not None and length > window and getattr(attention.config, "use_sliding_window", True):
        return f"sequences of {length} tokens are longer than its attention window of {window}"
    if not isinstance(getattr(attention, "scaling", None), float):
        return "its attention has no scaling"
    if not is_silu(mlp.act_fn):
        return f"its activation is {type(mlp.act_fn).__name__}, not SiLU"
    return None


def _hooked(module: nn.Module, own: frozenset[int]) -> bool:
    """Whether a module computes something else than its class; hooks ``own`` only bring its weights."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(held.keys() - own for held in hooks) or "forward" in module.__dict__
