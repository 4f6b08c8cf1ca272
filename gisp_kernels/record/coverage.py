"""Which weights of a model are scored, which are not, and which are no structures: nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from gisp_kernels.groups import WRAPPED, Projection, StructureGroup, unwrapped

# Modules that share their weights among all heads of their attention: no head takes them along.
SHARED = ("k_proj", "v_proj", "k", "v", "q_a_proj", "kv_a_proj_with_mqa")
ROUTERS = ("gate", "router", "shared_expert_gate")
HEADS = ("lm_head", "embed_out", "classifier", "score", "qa_outputs")
# What modules_to_save of PEFT calls the module that a trained copy stands in for.
_ORIGINAL = "original_module"
# Names that an error lists before it counts.
_LISTED = 6


@dataclass(frozen=True)
class Coverage:
    """What a recorder scores of its target.

    Attributes:
        scored: names of the weights that belong to structures.
        unscored: names of weights that do not, and that no rule leaves out.
        excluded: name -> the rule that leaves a parameter out.
        scored_parameters, parameters: their numbers, scored and in the whole target.
        unreached: names of groups with a weight that no backward pass has reached.
    """

    scored: tuple[str, ...]
    unscored: tuple[str, ...]
    excluded: dict[str, str]
    scored_parameters: int
    parameters: int
    unreached: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Scored parameters, of all parameters of the target."""
        return self.scored_parameters / max(1, self.parameters)

    def with_unreached(self, names: Iterable[str]) -> Coverage:
        """The same, with groups of which no backward pass has reached a weight."""
        return replace(self, unreached=tuple(names))


def coverage_of(target: nn.Module, groups: Sequence[StructureGroup], ignore: Iterable[str]) -> Coverage:
    """What ``groups`` score of ``target``.

    The rules that leave a parameter out: it has one dimension (norms, biases, scales) or is a bias of stacked experts;
    it is an embedding, or writes the output (``get_output_embeddings()``, :data:`HEADS`); it routes tokens to experts
    (:data:`ROUTERS`); it belongs to an adapter of PEFT; all heads of a scored attention share it (:data:`SHARED`).

    Args:
        ignore: patterns of ``fnmatch`` for names of further parameters to leave out.
    """
    numbers: dict[int, int] = {}
    for group in groups:
        for projection in group.projections:
            for parameter, number in _scored_parameters(projection):
                numbers[id(parameter)] = max(number, numbers.get(id(parameter), 0))
    rules = _Rules(target, groups, tuple(ignore))
    scored, unscored, excluded, total = [], [], {}, 0
    hidden = [(f"{name}.weight", weight) for name, weight in _hidden_weights(target)]
    for name, parameter in (*target.named_parameters(), *hidden):
        total += parameter.numel()
        rule = rules.of(name, parameter)
        if id(parameter) in numbers:
            scored.append(name)
        elif rule is not None:
            excluded[name] = rule
        else:
            unscored.append(name)
    return Coverage(tuple(scored), tuple(unscored), excluded, sum(numbers.values()), total)


def coverage_of_groups(groups: Sequence[StructureGroup]) -> Coverage:
    """Coverage of a target that is the groups themselves: all of it."""
    numbers, names = {}, []
    for group in groups:
        for number, projection in enumerate(group.projections):
            names.append(f"{group.name}.{number}.{projection.parameter}")
            numbers.update({id(p): (p.numel(), n) for p, n in _scored_parameters(projection)})
    scored = sum(own for _, own in numbers.values())
    return Coverage(tuple(names), (), {}, scored, sum(size for size, _ in numbers.values()))


def refuse_partial(coverage: Coverage, target: nn.Module) -> None:
    """Refuse a target that holds weights which are neither scored nor left out by a rule.

    Raises:
        ValueError: it does; the message names them and what to do.
    """
    if coverage.unscored:
        names = ", ".join(coverage.unscored[:_LISTED])
        more = len(coverage.unscored) - _LISTED
        raise ValueError(
            f"{len(coverage.unscored)} weights of {type(target).__name__} would not be scored: {names}"
            + (f" and {more} more" if more > 0 else "")
            + ". Pass StructureGroups that hold them (Projection(..., index=...) takes fused weights), name them in "
            "ignore=, or pass strict=False and read recorder.coverage()"
        )


def _hidden_weights(target: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Weights that layers hold as no parameter, quantised or packed: name of the layer, [O, I] without memory."""
    found = []
    for name, module in target.named_modules():
        rows, columns = (getattr(module, size, None) for size in ("out_features", "in_features"))
        own = any(p.dim() > 1 for p in module.parameters())
        if isinstance(rows, int) and isinstance(columns, int) and not own:
            computed = isinstance(module, nn.Linear) and isinstance(getattr(module, "weight", None), torch.Tensor)
            if not (computed and module.weight.dim() > 1):
                found.append((name, torch.empty(rows, columns, device="meta")))
    return found


def _scored_parameters(projection: Projection) -> list[tuple[torch.Tensor, int]]:
    """The parameters behind the weight of a projection, and how many of their elements belong to structures."""
    parameter = projection.linear._parameters.get(projection.parameter)
    if parameter is None:
        # A weight computed from others (weight_norm).
        return [(p, p.numel()) for p in projection.linear.parameters() if p.dim() > 1]
    if projection.index is None:
        return [(parameter, parameter.numel())]
    owned = len(projection.index.unique())
    return [(parameter, parameter.numel() // max(1, projection.width) * owned)]


class _Rules:
    def __init__(self, target: nn.Module, groups: Sequence[StructureGroup], ignore: tuple[str, ...]) -> None:
        self._ignore = ignore
        self._modules = dict(target.named_modules())
        self._attentions = {group.name for group in groups if group.kind == "heads"}
        self._embeddings = {
            id(module.weight) for module in self._modules.values() if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        output = getattr(target, "get_output_embeddings", lambda: None)()
        self._output = id(getattr(output, "weight", None))
        self._wrapped = [name for name, module in self._modules.items() if unwrapped(module) is not module]

    def of(self, name: str, parameter: torch.Tensor) -> str | None:
        """The rule that leaves a parameter out, or ``None``."""
        parts = [part for part in name.split(".") if part not in (*WRAPPED, _ORIGINAL)]
        module, parent = parts[-2] if len(parts) > 1 else "", ".".join(parts[:-2])
        if any(fnmatchcase(name, pattern) for pattern in self._ignore):
            return "ignored"
        if parameter.dim() < 2 or parts[-1].endswith("bias"):
            return "one dimension"
        if id(parameter) in self._embeddings or parts[-1].endswith("_token") or "embed" in ".".join(parts[-3:]):
            return "embedding"
        if id(parameter) == self._output or module in HEADS:
            return "output"
        if any(
            part in ROUTERS and hasattr(self._modules.get(".".join(parts[:depth])), "experts")
            for depth, part in enumerate(parts[:-1])
        ):
            return "router"
        if any(
            name.startswith(f"{own}.") and not any(name.startswith(f"{own}.{inner}.") for inner in WRAPPED)
            for own in self._wrapped
        ):
            return "adapter"
        return "shared by heads" if module in SHARED and parent in self._attentions else None
