"""Public names refuse arguments of another type in one line that names the argument or the value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gisp_kernels as gk

_GRADS, _FACTORS = torch.randn(4, 6), torch.ones(4)
_LINEAR = nn.Linear(6, 8)


def _group(name: str = "channels") -> gk.StructureGroup:
    return gk.StructureGroup(name, (gk.Projection(nn.Linear(4, 6), "row"), gk.Projection(nn.Linear(6, 4), "column")))


def _with_curvature(curvature: object) -> None:
    linear = nn.Linear(6, 8)
    group = gk.StructureGroup("g", (gk.Projection(linear, "column"),))
    with gk.record_importance([group], mode="second-order") as recorder:
        recorder.curvature = curvature  # type: ignore[assignment]
        linear(torch.randn(4, 3, 6, requires_grad=True)).sum().backward()


_WRONG_TYPES: dict[str, tuple[Callable[[], object], str]] = {
    "a scalar curvature": (lambda: gk.gate_sums(_GRADS, 4.0), "curvature must be a tensor, got float"),  # type: ignore[arg-type]
    "samples in a list": (lambda: gk.gate_sums(_GRADS, _FACTORS, [0, 0, 1, 1]), "samples must be a tensor, got list"),  # type: ignore[arg-type]
    "samples of floats": (lambda: gk.gate_sums(_GRADS, _FACTORS, torch.zeros(4)), "samples must be integers"),
    "a recorder's curvature": (lambda: _with_curvature(4.0), "curvature must be a tensor, got float"),
    "a block of an op": (
        lambda: gk.abs_weighted_reduce(torch.randn(4, 4), torch.randn(4, 4), axis="row", block=2.0),  # type: ignore[arg-type]
        "block must be a whole number, got 2.0",
    ),
    "a block of gates": (
        lambda: gk.gate_grads(torch.randn(1, 2, 4), torch.randn(1, 2, 4), block=2.0),  # type: ignore[arg-type]
        "block must be a whole number, got 2.0",
    ),
    "a block of a projection": (lambda: gk.Projection(_LINEAR, "row", 2.0), "block must be a whole number"),  # type: ignore[arg-type]
    "a layer in a group": (lambda: gk.StructureGroup("g", (_LINEAR,)), "'g' must hold Projections, got Linear"),  # type: ignore[arg-type]
    "a model to compact": (lambda: gk.Compactor(_LINEAR), "groups must be StructureGroups, got Linear"),  # type: ignore[arg-type]
    "one group to compact": (lambda: gk.Compactor(_group()), "groups must be StructureGroups, got StructureGroup"),  # type: ignore[arg-type]
    "names to compact": (lambda: gk.Compactor(["mlp"]), "groups must be StructureGroups, got str"),  # type: ignore[list-item]
    "an optimizer's name": (lambda: gk.Compactor([_group()], optimizer="adam"), "must be a torch.optim.Optimizer"),
    "removals in a list": (lambda: gk.Compactor([_group()]).remove([1, 2]), "removals must map names .* got list"),  # type: ignore[arg-type]
    "indices in a set": (lambda: gk.Compactor([_group()]).remove({"channels": {1}}), "a tensor or a list, got set"),  # type: ignore[dict-item]
    "activations of a model": (lambda: gk.record_activations(nn.Bilinear(2, 2, 2)), "linears must be .* got Bilinear"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", _WRONG_TYPES)
def test_an_argument_of_another_type_is_named(case: str) -> None:
    call, message = _WRONG_TYPES[case]
    with pytest.raises(TypeError, match=message):
        call()


def test_sums_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sums must have shape \[3, structures\], got \(6,\)"):
        gk.loss_change(torch.randn(6))


def test_an_unknown_axis_of_scores_is_refused() -> None:
    with gk.record_lines([_LINEAR]) as recorder:
        _LINEAR(torch.randn(3, 6)).sum().backward()
    with pytest.raises(ValueError, match="axis must be 'row', 'column' or 'element', got 'rows'"):
        recorder.scores_of(_LINEAR, "rows")  # type: ignore[arg-type]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.pooler = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4)


def test_one_pattern_to_ignore_is_not_its_letters() -> None:
    """Among them may be ``*``, which ignores all."""
    assert list(gk.record_importance(_Model(), ignore="pooler.*").scores())
    with pytest.raises(ValueError, match=r"pooler\.weight"):
        gk.record_importance(_Model(), ignore="up*")


def test_one_axis_and_one_group_are_not_their_letters() -> None:
    with gk.record_lines([_LINEAR], axes="row") as recorder:
        _LINEAR(torch.randn(3, 6)).sum().backward()
    assert recorder.scores_of(_LINEAR, "row").shape == (8,)
    compactor = gk.Compactor([_group("a"), _group("b")])
    compactor.remove({"a": [0], "b": [0]})
    compactor.pack(in_place=True, groups="a")
    assert (compactor.kept("a"), compactor.kept("b")) == (5, 5)


def test_an_iterator_that_was_read_before_is_refused() -> None:
    layers = iter([nn.Linear(4, 4)])
    gk.record_importance(layers)
    for record in (gk.record_importance, gk.record_lines):
        with pytest.raises(ValueError, match="an iterator that holds nothing any more"):
            record(layers)


def test_groups_may_come_from_an_iterator() -> None:
    """``iter_groups`` is one: a compactor that read it twice held no group."""
    compactor = gk.Compactor(group for group in (_group("a"), _group("b")))
    compactor.remove({"b": [1, 4]})
    assert (compactor.kept("a"), compactor.kept("b")) == (6, 4)
