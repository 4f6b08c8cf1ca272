"""Structure groups that Torch-Pruning's dependency graph finds, for models whose parts have no names we know.

::

    groups = dependency_groups(model, example_inputs, ignored_layers=[model.head])
    with record_importance(scored_parts(groups)) as recorder:
        model(example_inputs).sum().backward()
    lowest = {name: scores.argsort()[:16] for name, scores in recorder.scores().items()}
    Compactor(groups).remove(lowest)

The graph is Torch-Pruning's (Fang et al., arXiv 2301.12900), the walk through it is not: theirs compares every step
with all before it, and does not end where offsets of slices and concatenations go round in a circle, as they do for
rotary embeddings of shared key/value heads. Here such an index leaves its layer, which ends the walk with an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.dependency import Dependency
from torch_pruning.dependency.index_mapping import update_index_mapping

from gisp_kernels.groups import Axis, Projection, StructureGroup, is_matrix

__all__ = ["dependency_groups", "scored_parts"]

Line = tuple[nn.Module, Axis]
Item = tuple[int, int]  # index of a line in its layer, index of the root's row that it goes with


def dependency_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    num_heads: Mapping[nn.Module, int] | None = None,
    ignored_layers: Iterable[nn.Module] = (),
    root_module_types: Iterable[type[nn.Module]] = (nn.Linear, nn.modules.conv._ConvNd),
    **options: Any,
) -> list[StructureGroup]:
    """A group for every set of layers that lose outputs together, named by the first of them in module order.

    Args:
        model: traced once with ``example_inputs``.
        example_inputs: as of ``tp.DependencyGraph.build_dependency``.
        num_heads: the layer that the heads of an attention leave through -> their number: so many equal runs of its
            inputs are the structures. Elsewhere every output stands alone.
        ignored_layers: layers that keep their outputs, and with them every group that holds such outputs. No group
            begins at them.
        root_module_types: layers whose outputs begin a group.
        options: further ones of ``build_dependency`` (``output_transform``, ``customized_pruners``).

    Raises:
        ValueError: indices leave a layer, structures own different numbers of its lines, or a group holds a layer or
            parameter that cannot be cut; the message names it.
    """
    graph = tp.DependencyGraph().build_dependency(model, example_inputs, **{"verbose": False, **options})
    update_index_mapping(graph)
    heads, ignored, done = dict(num_heads or {}), set(ignored_layers), set[Line]()
    owners = {id(p): m for m in model.modules() for p in m._parameters.values() if p is not None}
    roots = tuple(root_module_types)
    groups = []
    for name, module in model.named_modules():
        root: Line = (module, "row")
        if not isinstance(module, roots) or module not in graph.module2node or module in ignored or root in done:
            continue
        lines, problem = _walk(graph, module, name, owners)
        done |= lines.keys()
        if any(axis == "row" and layer in ignored for layer, axis in lines):
            continue
        if problem:
            raise ValueError(f"{problem}. Name layers of this group in ignored_layers")
        groups.append(_group(name, root, lines, heads))
    return groups


def scored_parts(groups: Iterable[StructureGroup]) -> list[StructureGroup]:
    """The groups with those of their layers that a recorder scores: matrices, no convolutions, norms or embeddings.

    A group without one is left out.
    """
    parts = ((group, tuple(p for p in group.projections if is_matrix(p.linear))) for group in groups)
    return [StructureGroup(group.name, kept, group.kind) for group, kept in parts if kept]


def _walk(
    graph: Any, root: nn.Module, name: str, owners: Mapping[int, nn.Module]
) -> tuple[dict[Line, set[Item]], str | None]:
    """Lines of every layer that go with the outputs of the root, and why they are not all, where that is so."""
    prune = graph.get_pruner_of_module(root).prune_out_channels
    node = graph.module2node[root]
    count = graph.get_out_channels(root)
    index = tp._helpers._HybridIndex
    # Breadth first, so that what goes round in a circle meets the layers beside it.
    queue = deque([(Dependency(prune, prune, source=node, target=node), [index(i, i) for i in range(count)])])
    seen: set[Any] = set()
    numbers: dict[Any, int] = {}  # long index lists occur again and again
    lines: dict[Line, set[Item]] = {}
    problem: str | None = None
    while queue:
        dependency, found = queue.popleft()
        key = id(dependency.target), dependency.handler, numbers.setdefault(tuple(found), len(numbers))
        if key in seen:
            continue
        seen.add(key)
        line = _line(graph, dependency, owners)
        if line is not None:
            target = dependency.target.module
            if isinstance(target, nn.Parameter) and target.dim() != 1:
                problem = (
                    f"the outputs of {name!r} go with a parameter of shape {tuple(target.shape)} of a "
                    f"{type(line[0]).__name__}, whose outputs and inputs the dependency graph does not know"
                )
                continue
            try:
                width = Projection(*line).width
            except (TypeError, ValueError) as error:
                problem = f"the outputs of {name!r} go with a {type(line[0]).__name__}: {error}"
                continue
            if any(item.root_idx is None or not 0 <= item.idx < width for item in found):
                raise ValueError(
                    f"the dependency graph of the outputs of {name!r} leaves the {width} {line[1]}s of a "
                    f"{type(line[0]).__name__}: it does not follow how heads are shared or turned. Name the layer "
                    "in ignored_layers, or take its groups from gisp_kernels.iter_groups"
                )
            lines.setdefault(line, set()).update((item.idx, item.root_idx) for item in found)
        for following in dependency.target.dependencies:
            if following.is_triggered_by(dependency.handler):
                mapped = found
                for mapping in following.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
                if mapped:
                    queue.append((following, mapped))
    return lines, problem


def _line(graph: Any, dependency: Any, owners: Mapping[int, nn.Module]) -> Line | None:
    """The layer and axis that a dependency cuts, or ``None`` for an operation without weights."""
    module = dependency.target.module
    if isinstance(module, nn.Parameter):
        return owners[id(module)], "row"
    if not any(True for _ in module.parameters(recurse=False)):
        return None
    rows = graph.is_out_channel_pruning_fn(dependency.handler)
    return module, "row" if rows else "column"


def _group(name: str, root: Line, lines: dict[Line, set[Item]], heads: Mapping[nn.Module, int]) -> StructureGroup:
    """Structures are the classes of outputs of the root that share a line with each other."""
    structure = list(range(Projection(*root).width))

    def first(output: int) -> int:
        while structure[output] != output:
            structure[output] = structure[structure[output]]
            output = structure[output]
        return output

    def join(outputs: Iterable[int]) -> None:
        least, *others = sorted({first(output) for output in outputs})
        for other in others:
            structure[other] = least

    for (layer, axis), items in lines.items():
        run = Projection(layer, axis).width // heads[layer] if axis == "column" and layer in heads else 1
        together: dict[int, list[int]] = {}
        for line, output in items:
            together.setdefault(line // run, []).append(output)
        for outputs in together.values():
            join(outputs)
    order = {least: number for number, least in enumerate(sorted({first(output) for output in structure}))}
    return StructureGroup(name, tuple(_projection(name, line, items, order, first) for line, items in lines.items()))


def _projection(name: str, line: Line, items: set[Item], order: Mapping[int, int], first: Any) -> Projection:
    layer, axis = line
    own: list[set[int]] = [set() for _ in order]
    for index, output in items:
        own[order[first(output)]].add(index)
    if len({len(indices) for indices in own}) != 1:
        raise ValueError(
            f"group {name!r}: its structures own different numbers of {axis}s of a {type(layer).__name__}: name the "
            "layer in ignored_layers"
        )
    if len(own) == Projection(layer, axis).width and all(indices == {n} for n, indices in enumerate(own)):
        return Projection(layer, axis)
    return Projection(layer, axis, index=torch.tensor([sorted(indices) for indices in own]))
