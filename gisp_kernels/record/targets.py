"""What may be recorded: the groups of a target, and which way each of their weights can be scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gisp_kernels import checks
from gisp_kernels.families import iter_groups
from gisp_kernels.groups import Projection, StructureGroup, unwrapped
from gisp_kernels.record.attach.parallel import is_sharded
from gisp_kernels.record.attach.tap import is_recorded

Mode = Literal["stream", "exact", "signed", "second-order"]
Target = nn.Module | Iterable[StructureGroup] | Iterable[nn.Module] | Mapping[str, nn.Module]
Way = Literal["forward", "weight", "beside"]


def is_layer(module: Any) -> bool:
    """Whether a module is a Linear layer, of torch or as transformers' ``Conv1D``, in an adapter or by itself."""
    module = unwrapped(module)
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def groups_of(target: Target) -> tuple[StructureGroup, ...]:
    """The groups of a target as :func:`gisp_kernels.record_importance` takes it.

    Raises:
        TypeError: it is no such target.
        ValueError: a module without any group.
    """
    if isinstance(target, nn.Module) and not is_layer(target):
        groups = tuple(iter_groups(target))
        if not groups:
            raise ValueError(
                f"no attention (q_proj, k_proj, v_proj, o_proj) or gated MLP (gate_proj, up_proj, down_proj) found in "
                f"{type(target).__name__}: pass StructureGroups or nn.Linear layers"
            )
        return groups
    if isinstance(target, Iterable) and not isinstance(target, Mapping | nn.Module):
        items = _listed(target)
        if all(isinstance(item, StructureGroup) for item in items):
            return tuple(items)
        target = items
    return tuple(StructureGroup(n, (Projection(linear, "row"),)) for n, linear in named_layers(target).items())


def named_layers(target: Any) -> dict[str, Any]:
    """Layers by name: those of a mapping, of an iterable by position, one layer, or all those of a module.

    In a module, layers of adapters are left out.

    Raises:
        TypeError: something is no Linear layer.
        ValueError: a module without one.
    """
    if isinstance(target, nn.Module) and not is_layer(target):
        return _layers_in(target)
    if isinstance(target, nn.Module):
        target = [target]
    if isinstance(target, Mapping):
        named = {str(name): linear for name, linear in target.items()}
    elif isinstance(target, Iterable):
        named = {str(i): item for i, item in enumerate(_listed(target))}
    else:
        raise TypeError(f"target must be a module, StructureGroups or nn.Linear layers, got {type(target).__name__}")
    for name, linear in named.items():
        if not is_layer(linear):
            raise TypeError(f"target[{name!r}] must be an nn.Linear, got {type(linear).__name__}")
    return {name: unwrapped(linear) for name, linear in named.items()}


def _listed(target: Iterable[Any]) -> list[Any]:
    """What an iterable holds.

    Raises:
        ValueError: it is an iterator that was read before.
    """
    items = list(target)
    if not items and isinstance(target, Iterator):
        raise ValueError("target is an iterator that holds nothing any more: give a list, which can be read again")
    return items


def _layers_in(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    wrappers: list[str] = []
    for name, child in module.named_modules():
        if any(name.startswith(f"{wrapper}.") for wrapper in wrappers):
            continue
        if unwrapped(child) is not child:
            wrappers.append(name)
        if is_layer(child):
            found[name] = unwrapped(child)
    if not found:
        raise ValueError(f"no nn.Linear found in {type(module).__name__}")
    return found


def line_groups(target: Any, axes: Iterable[Any], without: Iterable[int] = ()) -> tuple[StructureGroup, ...]:
    """A group ``"NAME.AXIS"`` for every layer of a target and every axis; ``without``: ids of weights to leave out."""
    left_out = set(without)
    return tuple(
        StructureGroup(f"{name}.{axis}", (Projection(linear, axis),))
        for name, linear in named_layers(target).items()
        if id(linear.weight) not in left_out
        for axis in axes
    )


def way_of(name: str, projection: Projection, *, mode: Mode, keep_grad: bool) -> Way:
    """How the weight of a projection is scored: in the ``"forward"`` of its layer, at the gradient of the
    ``"weight"``, or by what passes ``"beside"`` it, which leaves the weight its gradient.

    Args:
        name: of the group, for messages.

    Raises:
        TypeError: neither way is open; the message says why and what to do.
        ValueError: not in this mode.
    """
    module, parameter = projection.linear, projection.parameter
    label, kind = f"the weight of a layer of group {name!r}", type(module).__name__
    if is_parametrized(module, parameter) and any(
        part.training and any(True for _ in part.buffers()) for part in module.parametrizations[parameter]
    ):
        raise TypeError(
            f"{label} changes buffers whenever it is read (spectral_norm): call eval() on its parametrizations"
        )
    weight = getattr(module, parameter)
    checks.check_float(label, weight)
    if weight.dim() not in (2, 3):
        raise ValueError(f"{label} must have 2 dimensions, or 3 for experts, got shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise TypeError(f"{label} has no memory on this machine: it cannot be recorded while it is offloaded")
    if not is_sharded(weight) and is_traceable_wrapper_subclass(weight):
        raise TypeError(f"{label} is a {type(weight).__name__}, no plain tensor: record the model before quantising it")
    computed = module._parameters.get(parameter) is None
    watched = keep_grad and weight.requires_grad
    if watched and computed:
        raise TypeError(
            f"{label} is computed from other parameters (weight_norm, parametrize): keep_grad=True needs a parameter"
        )
    if is_sharded(weight) and not watched:
        raise TypeError(f"{label} is sharded (fully_shard, parallelize_module): pass keep_grad=True, with it trainable")
    if _has_own_forward_of_linear(module) and parameter == "weight" and not (watched and mode != "second-order"):
        return "beside" if watched else "forward"
    if computed or weight.is_inference():
        raise TypeError(
            f"group {name!r}: a {kind} with its own forward is scored at the gradient of its weight, which must be a "
            "parameter that can require one (no weight_norm or parametrize, not made in inference mode)"
        )
    if mode == "second-order":
        raise ValueError(
            f"group {name!r}: mode 'second-order' scores the forward of a plain nn.Linear, not weight gradients; got a "
            f"{kind}"
        )
    return "weight"


def _has_own_forward_of_linear(module: nn.Module) -> bool:
    replaced = "forward" in module.__dict__ and not is_recorded(module)
    return type(module).forward is nn.Linear.forward and not replaced


def refuse_sharing(ways: Mapping[tuple[nn.Module, str], tuple[str, Way, torch.Tensor]]) -> None:
    """Refuse two layers with one weight, where the gradient of each layer's uses is read apart.

    Args:
        ways: of every weight (module and name): its group, way and tensor.

    Raises:
        ValueError: there are two.
    """
    owners: dict[int, str] = {}
    for name, way, weight in ways.values():
        if way != "weight" and id(weight) in owners:
            raise ValueError(
                f"two layers (groups {owners[id(weight)]!r} and {name!r}) share one weight: their gradients cannot be "
                "told apart; keep_grad=True scores the whole gradient"
            )
        owners[id(weight)] = name


def refuse_tied(target: Any, groups: Iterable[StructureGroup], *, mode: Mode, keep_grad: bool) -> None:
    """Refuse a scored weight that another module of the target holds too, unless its whole gradient is read.

    Raises:
        ValueError: there is one.
    """
    if not isinstance(target, nn.Module):
        return
    scored = {(id(p.linear), p.parameter) for group in groups for p in group.projections}
    holders: dict[int, str] = {}
    for path, module in target.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (id(module), name) not in scored:
                holders[id(parameter)] = f"{path}.{name}"
    for group in groups:
        for projection in group.projections:
            weight = getattr(projection.linear, projection.parameter)
            whole = weight.requires_grad and (keep_grad or mode in ("exact", "signed"))
            if id(weight) in holders and not whole:
                raise ValueError(
                    f"a weight of group {group.name!r} is {holders[id(weight)]!r} too, and the scores of its uses do "
                    "not add up: pass keep_grad=True, with the weight trainable, which reads the whole gradient"
                )


def refuse_split(target: Any) -> None:
    """Refuse a module whose layers hold flattened parts of their weights.

    Raises:
        RuntimeError: the target holds one.
    """
    if not isinstance(target, nn.Module):
        return
    for module in target.modules():
        flat = type(module).__name__ == "FullyShardedDataParallel" or not getattr(module, "_fsdp_use_orig_params", True)
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        part = weight is not None and not is_lazy(weight) and weight.dim() != 2
        if flat or part or any(hasattr(p, "ds_id") for p in module._parameters.values()):
            raise RuntimeError(
                "FullyShardedDataParallel and ZeRO-3 hold weights flattened and split: use fully_shard or ZeRO-2"
            )


def refuse_wrapped(target: Any, *, keep_grad: bool) -> None:
    """Refuse a module that would wait for gradients which recording takes away.

    Raises:
        RuntimeError: the target holds one.
    """
    if keep_grad or not isinstance(target, nn.Module):
        return
    for module in target.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise RuntimeError("DataParallel runs copies of layers on other devices: pass keep_grad=True")
        if (
            isinstance(module, nn.parallel.DistributedDataParallel)
            and not module.find_unused_parameters
            and any(p.requires_grad for p in module.parameters())
        ):
            raise RuntimeError(
                "DistributedDataParallel waits for the weight gradients that recording takes away: pass keep_grad=True"
            )
