"""What a path names, opened and evaluated: a model, an export, a nested checkpoint or a run, at any of its points."""

from gisp.target.evaluate import evaluate_along, evaluate_target

__all__ = ["evaluate_along", "evaluate_target"]
