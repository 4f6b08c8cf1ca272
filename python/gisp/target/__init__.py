"""What a path names, opened and evaluated: a model, an export, a nested checkpoint or a run, at any of its points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gisp.lazy import lazy

if TYPE_CHECKING:
    from gisp.target.evaluate import evaluate_along, evaluate_target

__all__ = ["evaluate_along", "evaluate_target"]

__getattr__ = lazy(__name__, dict.fromkeys(__all__, "gisp.target.evaluate"))
