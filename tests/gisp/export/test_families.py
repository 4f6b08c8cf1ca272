"""Every family, position encoding and setting: exports compute what the masked dense model does, also past its context.

``GISP_TEST_MATRIX=full`` runs every combination instead of a set in which every pair of values occurs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import VOCAB, export_one_size, masked, spec_of
from family_cases import LENGTH, ORIGINAL, ROPES, Case, build, cases, covering

import gisp
from gisp.errors import GispError
from gisp.export.formats.hf import export_hf, pruned_config, pruned_state
from gisp.export.formats.masked import export_masked
from gisp.export.modeling_gisp import FAMILIES, classes_of
from gisp.export.relayout import plan_layers
from gisp.model.probe import PROVEN
from gisp.model.structures import map_model

SPEC = spec_of()


def logits(model: Any, length: int = LENGTH) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def exported(base: Any) -> Any:
    """The exported model, without files."""
    model_map = map_model(base)
    layouts = plan_layers(model_map, SPEC.keep)
    model = classes_of(f"gisp_{model_map.model_type}")[2](pruned_config(base, model_map, SPEC, layouts))
    absent = model.load_state_dict(pruned_state(base, model_map, SPEC.keep, layouts), strict=False)
    assert not absent.unexpected_keys
    assert set(absent.missing_keys) <= ({"lm_head.weight"} if base.config.tie_word_embeddings else set())
    model.tie_weights()
    return model.eval()


def assert_same(got: Any, wanted: Any, case: Any) -> None:
    """Past the context, within the original one after that, and past it again: frequencies follow the length."""
    for length in (LENGTH, ORIGINAL // 2, LENGTH):
        truth = logits(wanted, length)
        assert float((logits(got, length) - truth).abs().max() / truth.abs().max()) <= 1e-5, (case, length)


def test_all_families_are_proven() -> None:
    assert frozenset(FAMILIES) == PROVEN


def test_every_pair_of_values_is_covered() -> None:
    rows = covering((("a", "b", "c"), (0, 1), (2, 3, 4)))
    assert {(row[0], row[2]) for row in rows} == {(a, c) for a in "abc" for c in (2, 3, 4)}
    assert {(row[1], row[2]) for row in rows} == {(b, c) for b in (0, 1) for c in (2, 3, 4)}
    assert {(row[0], row[1]) for row in rows} == {(a, b) for a in "abc" for b in (0, 1)}
    assert len(rows) <= 11
    assert {case.rope for case in cases("granite")} == set(ROPES)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_computes_what_the_masked_model_does(family: str) -> None:
    for case in cases(family):
        base = build(case)
        assert_same(exported(base), masked(base, SPEC.keep), case)


@pytest.mark.parametrize(("family", "rope"), [*zip(FAMILIES, 3 * [*ROPES], strict=False)])
def test_an_exported_folder_does(family: str, rope: str, tmp_path: Path) -> None:
    """Loading makes frequencies anew: nothing of them is in the files."""
    base = build(Case(family, rope, bias=True, tied=True, window=True, head_dim=8))
    export_hf(base, SPEC, tmp_path / "out")
    assert_same(gisp.load(tmp_path / "out"), masked(base, SPEC.keep), (family, rope))


@pytest.mark.parametrize("number", range(0, len(FAMILIES), 3))
def test_masked_and_uniform_folders_do(number: int, tmp_path: Path) -> None:
    family, rope = list(FAMILIES)[number], [*ROPES][number % len(ROPES)]
    base = build(Case(family, rope, bias=False, tied=False, window=True, head_dim=8))
    export_masked(base, SPEC, tmp_path / "masked")
    assert_same(gisp.load(tmp_path / "masked"), masked(base, SPEC.keep), family)
    try:
        export_one_size(base, SPEC, tmp_path / "uniform")
    except GispError as error:
        assert "use --format hf" in str(error)
    else:
        assert type(gisp.load(tmp_path / "uniform").config).__name__ in (type(base.config).__name__, "MistralConfig")
