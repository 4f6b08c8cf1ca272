"""Ways of pruning libraries, by their own code, where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from benchmarks.embed.subject import Subject
from benchmarks.embed.ways import GRAD, Scores, Step, Way, requiring_grad
from gisp_kernels import StructureGroup

TORCH_PRUNING, LLM_PRUNER = "Torch-Pruning, channels", "LLM-Pruner"


@contextmanager
def torch_pruning(subject: Subject) -> Iterator[Step]:
    """``GroupTaylorImportance`` of Torch-Pruning (Fang et al., arXiv 2301.12900) on the groups its graph finds.

    It scores MLP channels alone, fewer structures than the other ways: heads are no groups of its own.
    """
    import torch_pruning as tp

    mlps = {g.name: g for g in subject.groups if g.kind == "channels"}
    importance = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)
    with requiring_grad(subject.groups) as weights:
        graph = tp.DependencyGraph().build_dependency(
            subject.decoder,
            example_inputs={"input_ids": subject.ids[:1], "use_cache": False},
            output_transform=lambda output: output.last_hidden_state,
            verbose=False,
        )
        groups = {name: _group(graph, group) for name, group in mlps.items()}

        def step() -> Scores:
            subject.backward()
            scores = {name: importance(group).float() for name, group in groups.items()}
            for weight in weights:
                weight.grad = None
            return scores

        yield step


def _group(graph: object, group: StructureGroup) -> object:
    """Torch-Pruning's own group of the channels of an MLP."""
    import torch_pruning as tp

    rows = next(p.linear for p in group.projections if p.axis == "row")
    return graph.get_pruning_group(rows, tp.prune_linear_out_channels, list(range(group.count)))  # type: ignore[attr-defined]


@contextmanager
def llm_pruner(subject: Subject) -> Iterator[Step]:
    """``TaylorImportance`` of LLM-Pruner (Ma et al., arXiv 2305.11627), by default (``param_first``).

    The groups are those its graph makes: rows and columns of the layers, dimension by dimension. Dimensions of a head
    are summed afterwards, as its pruner does.
    """
    import LLMPruner.torch_pruning as tp
    from LLMPruner.pruner.hf_llama_pruner import TaylorImportance

    handlers = {"row": tp.prune_linear_out_channels, "column": tp.prune_linear_in_channels}
    importance = TaylorImportance(group_reduction="sum", taylor="param_first")

    def parts(group: StructureGroup) -> list[tuple[object, list[int]]]:
        return [
            (SimpleNamespace(target=SimpleNamespace(module=p.linear), handler=handlers[p.axis]), list(range(p.width)))
            for p in group.projections
        ]

    with requiring_grad(subject.groups) as weights:
        groups = {group.name: (group.count, parts(group)) for group in subject.groups}

        def step() -> Scores:
            subject.backward()
            scores = {name: importance(group).float().view(n, -1).sum(1) for name, (n, group) in groups.items()}
            for weight in weights:
                weight.grad = None
            return scores

        yield step


# As WAYS: way, and whose scores they must be.
PEERS: dict[str, tuple[Way, str]] = {
    name: (way, GRAD)
    for name, package, way in (
        (TORCH_PRUNING, "torch_pruning", torch_pruning),
        (LLM_PRUNER, "LLMPruner", llm_pruner),
    )
    if importlib.util.find_spec(package)
}
