"""Finding groups in a model by the names and shapes of its parts, without knowing whose model it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gisp_kernels.groups import (
    Projection,
    StructureGroup,
    attention_group,
    attention_layers,
    layers_of,
    mlp_group,
    mlp_layers,
)


def latent_attention_group(name: str, attention: Any) -> StructureGroup:
    """Heads of a multi-head latent attention (DeepSeek-V2 and V3), which expands keys and values from a latent.

    A head owns its rows of ``q_b_proj`` (or ``q_proj``) and ``kv_b_proj`` and its columns of ``o_proj``. The
    projections into latents, ``q_a_proj`` and ``kv_a_proj_with_mqa``, are shared by all heads.

    Raises:
        ValueError: the module is none.
    """
    layers = _latent_layers(attention)
    if layers is None:
        raise ValueError(f"group {name!r}: {type(attention).__name__} is no multi-head latent attention")
    query, key_value, output = layers
    value_dim = int(attention.v_head_dim)
    parts = (
        Projection(query, "row", int(attention.qk_head_dim)),
        Projection(key_value, "row", int(attention.qk_nope_head_dim) + value_dim),
        Projection(output, "column", value_dim),
    )
    return StructureGroup(name, parts, "heads")


def _latent_layers(module: Any) -> list[Any] | None:
    if not all(hasattr(module, name) for name in ("qk_head_dim", "qk_nope_head_dim", "v_head_dim")):
        return None
    query = "q_b_proj" if getattr(module, "q_b_proj", None) is not None else "q_proj"
    return layers_of(module, (query, "kv_b_proj", "o_proj"))


def experts_group(name: str, experts: Any) -> StructureGroup:
    """Channels of experts that lie in one tensor, as transformers has them since 5.12: structure ``e * I + i``.

    A channel owns its rows of ``gate_up_proj`` (or ``up_proj``) and its column of ``down_proj``. Sums over
    ``scores.view(E, I)`` are scores of whole experts.

    Raises:
        ValueError: the module holds no such experts.
    """
    into = _experts_input(experts)
    if into is None:
        raise ValueError(f"group {name!r}: {type(experts).__name__} holds no experts in one tensor")
    out = Projection(experts, "column", parameter="down_proj")
    count, width = len(out.weight), out.weight.shape[-1]
    rows = torch.arange(Projection(experts, "row", parameter=into).width)
    if into == "up_proj":
        index = rows[:, None]
    elif experts.is_concatenated:
        index = rows.view(count, 2, width).transpose(1, 2).flatten(0, 1)
    else:
        index = rows.view(-1, 2)
    parts = (Projection(experts, "row", index=index, parameter=into), out)
    return StructureGroup(name, parts, "channels")


def _experts_input(module: Any) -> str | None:
    """Name of the weight into the channels of stacked experts that say how they are laid out, or ``None``."""
    if not all(hasattr(module, name) for name in ("is_transposed", "is_concatenated")):
        return None
    name = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    weights = [getattr(module, part, None) for part in (name, "down_proj")]
    return name if all(isinstance(w, torch.Tensor) and w.dim() == 3 for w in weights) else None


def iter_groups(model: nn.Module) -> Iterator[StructureGroup]:
    """Groups of every attention, MLP and stack of experts found in ``model``, in module order.

    They are told by attribute names: :data:`gisp_kernels.groups.ATTENTIONS` with ``head_dim``,
    :data:`gisp_kernels.groups.MLPS`, and those of :func:`latent_attention_group` and :func:`experts_group`. Layers
    inside adapters of PEFT are found, the adapters are not part of a group. A module whose widths do not fit the
    pattern is left out.
    """
    for name, module in model.named_modules():
        for fits, group_of in (
            (attention_layers, attention_group),
            (_latent_layers, latent_attention_group),
            (mlp_layers, mlp_group),
            (_experts_input, experts_group),
        ):
            if fits(module):
                try:
                    yield group_of(name, module)
                except ValueError:
                    continue
                break
