"""Evaluation: perplexity, choice accuracy, exact match and lm-eval tasks, at one sparsity or along a whole run."""

from gisp.evaluation.data import EvalOptions
from gisp.evaluation.evaluate import evaluate_along, evaluate_target
from gisp.evaluation.harness import LmEvalTasks
from gisp.evaluation.perplexity import Perplexity, perplexity

__all__ = ["EvalOptions", "LmEvalTasks", "Perplexity", "evaluate_along", "evaluate_target", "perplexity"]
