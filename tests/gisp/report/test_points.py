"""The picture of evaluations, whatever their data is called."""

from __future__ import annotations

import warnings

import pytest

from gisp.report.points import draw_evaluations
from gisp.report.style import LIGHT, themed, to_png
from gisp.run.evaluations import Evaluation, Figure


@pytest.mark.parametrize("name", ["a$_{$.jsonl", "日本.jsonl", "{x}%s.jsonl"])
def test_names_of_files_are_no_formulas(name: str) -> None:
    found = [
        Evaluation("gisp", sparsity, (Figure("perplexity", 5 + sparsity),), data=f"/x/{data}")
        for sparsity in (0.0, 0.3)
        for data in (name, "b.jsonl")
    ]
    with warnings.catch_warnings(), themed(LIGHT):
        warnings.simplefilter("error")
        assert to_png(draw_evaluations(found, LIGHT)).startswith(b"\x89PNG")
