"""Tests of formulas take every change as it is; what is kept of it has tests of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gisp.compensation import acceptance
from gisp.compensation.methods import sweep


def _first(
    measure: Callable[[float], acceptance.Measured], first: float, start: acceptance.Measured, **_: float
) -> tuple[float, acceptance.Measured]:
    return first, measure(first)


@pytest.fixture
def loss_counts() -> None:
    """A change counts only where it does not raise the loss of held-out text, as in use."""


@pytest.fixture(autouse=True)
def _any_loss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are random and so is their text: which model predicts it best says nothing."""
    if "loss_counts" not in request.fixturenames:
        monkeypatch.setattr(acceptance.Limit, "excess", lambda *_: -1.0)


@pytest.fixture
def accept_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits at their whole size, in all blocks, whatever held-out text says; training and steps likewise."""
    monkeypatch.setattr(acceptance.Difference, "falls", True)
    monkeypatch.setattr(sweep, "search", _first)


@pytest.fixture
def light_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's pictures are drawn once a layout: the dark ones, whose colours alone differ, are the light ones."""
    from gisp.report import style, write

    drawn: dict[tuple[int, int], tuple[Any, dict[str, bytes]]] = {}
    render = write.render

    def light(run: Any, theme: Any) -> dict[str, bytes]:
        asked = (id(run), theme.columns)
        if asked not in drawn:
            look = style.LIGHT if theme.columns == style.LIGHT.columns else style.LIGHT.narrow
            # The run is kept: another one must not get its number.
            drawn[asked] = run, render(run, look)
        return drawn[asked][1]

    monkeypatch.setattr(write, "render", light)
