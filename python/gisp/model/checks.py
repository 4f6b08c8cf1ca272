"""What a model must be so that its heads and channels can be removed; each refusal names what to do."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gisp.errors import GispError
from gisp_kernels.checks import memory_span
from gisp_kernels.groups import PROJECTIONS

SUPPORTED = "layers with Llama's projections (Llama, Mistral, Qwen2, Qwen3, Gemma and more) are supported"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_model(model: Any) -> None:
    """Refuse what wraps a causal language model, is only a part of it, or attends in a way of its own.

    Raises:
        GispError: names which.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise GispError("the model is compiled by torch.compile: give the model that was compiled, model._orig_mod")
    check_no_adapters(model)
    if isinstance(getattr(model, "layers", None), nn.ModuleList):
        raise GispError(f"{name} is a decoder without output embeddings: give the causal language model it is part of")
    if getattr(model, "get_output_embeddings", lambda: model)() is None:
        raise GispError(f"{name} predicts no tokens, it has no output embeddings: give a causal language model")
    config = getattr(model, "config", None)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped or getattr(model, "_supports_sdpa", True) is False:
        raise GispError(other_attention(str(getattr(config, "model_type", name))))


def check_no_adapters(model: nn.Module) -> None:
    """Refuse a model in which adapters of peft stand in for layers.

    Raises:
        GispError: they do.
    """
    if hasattr(model, "merge_and_unload") or any(hasattr(module, "base_layer") for module in model.modules()):
        name = type(model).__name__
        raise GispError(f"the model carries peft adapters ({name}): merge them first, model.merge_and_unload()")


def other_attention(model_type: str) -> str:
    """Why a model type whose attention is not the common one is refused."""
    return (
        f"model type {model_type!r} does not attend by scaled dot-product attention alone (it caps scores, adds sinks "
        "or has other layers): such models are not supported"
    )


def check_weights(weights: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse weights that cannot be changed in place or computed with one another.

    Args:
        weights: those of a model that this process holds, by name.

    Raises:
        GispError: a parameter was made in inference mode, has no memory or less than its shape, or another dtype.
    """
    first: tuple[str, nn.Parameter] | None = None
    for name, parameter in weights:
        if parameter.is_inference():
            raise GispError(f"{name} was made in torch.inference_mode and cannot be changed: load the model outside it")
        if parameter.is_meta:
            raise GispError(f"{name} has no memory, it is on meta: load the weights of this model first")
        if parameter.numel() > memory_span(parameter):
            raise GispError(f"{name} {list(parameter.shape)} is expanded from less memory: give it memory of its own")
        first = first or (name, parameter)
        if parameter.dtype != first[1].dtype:
            kinds = f"{first[0]} is {first[1].dtype}, {name} is {parameter.dtype}"
            raise GispError(f"{kinds}: convert the model to one dtype, model.to({first[1].dtype})")


def check_autocast(what: str) -> None:
    """Refuse a caller's autocast, under which products have another dtype than the weights.

    Args:
        what: does not go with it.

    Raises:
        GispError: it is on.
    """
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            raise GispError(f"torch.autocast is on for {kind}, {what} computes in the dtype of the weights: leave it")


def check_unshared(model: nn.Module, layers: nn.ModuleList) -> None:
    """Refuse weights of a model's layers that stand in it twice: what one place loses the other would lose too.

    Raises:
        GispError: names both places.
    """
    places: dict[int, str] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            place = f"{name} of layer {index}"
            first = places.setdefault(id(parameter), place)
            if first != place:
                raise GispError(f"{place} is {first}: give a model whose layers share no weights")
    own = {id(module) for module in layers.modules()}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False) if id(module) not in own else ():
            if id(parameter) in places:
                where = f"{places[id(parameter)]} is {path}.{name}"
                raise GispError(f"{where}: give a model whose layers share no weights")


def check_linear(linear: nn.Linear, where: str) -> None:
    """Refuse weights of another dtype, and layers that compute more than a product.

    Raises:
        GispError: names the layer.
    """
    dtype = linear.weight.dtype
    if dtype == torch.float64:
        raise GispError(f"{where} holds float64 weights: convert the model first, model.float()")
    if dtype not in _DTYPES:
        raise GispError(f"{where} holds {dtype} weights: give a model that is not quantised")
    if type(linear).forward is not nn.Linear.forward or "forward" in linear.__dict__:
        raise GispError(f"{where} is a {type(linear).__name__} with its own forward: remove adapters and hooks first")


def check_layer(layer: Any, where: str) -> None:
    """Account for every parameter of a layer: it belongs to a projection or is the same whatever is removed.

    The same are the layer's own norms, of hidden size, and norms that all heads share, one weight for each of
    ``head_dim``. Whatever spans heads or channels and is moved by no group would fail once the layer is pruned.

    Raises:
        GispError: names the parameter.
    """
    attention = layer.self_attn
    head_dim = int(attention.head_dim)
    queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
    channels, hidden = layer.mlp.gate_proj.out_features, attention.q_proj.in_features
    # Outside the two blocks vectors of the hidden size are the layer's own norms.
    spans = {"self_attn": {queries, keys, queries // head_dim, keys // head_dim} - {1}, "mlp": {channels}}
    moved = {f"{p.module}.{p.name}.{part}" for p in PROJECTIONS for part in ("weight", "bias")}
    for name, parameter in layer.named_parameters():
        module, _, rest = name.partition(".")
        shape = tuple(parameter.shape)
        shared = module == "self_attn" and shape == (head_dim,) and rest.count(".") == 1
        if name in moved or shared:
            continue
        # A list of modules has one for each head.
        listed = module == "self_attn" and any(part.isdigit() for part in rest.split("."))
        if listed or spans.get(module, {queries, keys, channels} - {hidden}).intersection(shape):
            raise GispError(f"{where}: {name} {list(shape)} spans heads or channels: {SUPPORTED}")


def warn_beyond_positions(config: Any, tokens: int) -> None:
    """Warn of sequences longer than what a model was made for."""
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and tokens > most:
        warnings.warn(
            f"sequences of {tokens} tokens are longer than the {most} positions this model was made for "
            "(max_position_embeddings): give shorter ones",
            stacklevel=2,
        )
