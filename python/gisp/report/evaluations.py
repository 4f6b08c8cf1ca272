"""Evaluations of a run as rows of a table, for the page and the command line."""

from __future__ import annotations

from collections.abc import Iterable

from gisp.run.evaluations import Evaluation, amount_text, figure_text, method_text

HEADER = ("Method", "Sparsity", "Figure", "Value", "Measured on", "Conditions")
TEXTS = (0, 2, 4, 5)
"""Columns of :data:`HEADER` that are no numbers."""


def evaluation_rows(evaluations: Iterable[Evaluation]) -> list[tuple[str, ...]]:
    """One row for each figure, those that are to be compared with one another side by side; see :data:`HEADER`."""
    found = [(evaluation, figure) for evaluation in evaluations for figure in evaluation.figures]
    found.sort(key=lambda e: (e[0].source, e[0].conditions, e[1].name, e[0].label, e[0].compensation, e[0].sparsity))
    return [
        (
            method_text(evaluation),
            f"{100 * evaluation.sparsity:.2f} %",
            figure.name,
            figure_text(figure),
            amount_text(evaluation),
            evaluation.conditions,
        )
        for evaluation, figure in found
    ]
